// Eight pairs of short sentences at a time: one word of each pair's bits in every lane of a vector. y lies along the
// bits, 64 tokens a word, and x gives the rows; the masks of equal tokens come from comparing a token of x with all of
// y, so there is no table of symbols. Ids are compared in 16 or 32 bits; pairs with larger ones are left to the caller.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "levenshtein/match.h"

// Unnamed on purpose: the including file is compiled once per instruction set, and no copy may stand in for another.
namespace {

constexpr int kLanes = 8;
typedef uint64_t Lanes __attribute__((vector_size(64)));    // the compiler's own vector, for any instruction set
typedef int64_t LaneMask __attribute__((vector_size(64)));  // of a comparison: 0 or -1; (Lanes) takes its bits

enum class Fit { kYes, kTooLarge, kPadded };

// Eight pairs, y of at most kTokens tokens and x of at most twice as many, their ids in [0, 65535] (Code uint16_t) or
// anywhere in an int32_t.
template <int kTokens, class Code>
class Group {
 public:
  static constexpr int kWords = (kTokens + 63) / 64;
  static constexpr int kRows = 2 * kTokens;
  static constexpr int kRowWords = kRows / 64;

  // Puts the pair (x, y), whose rows are `width` and `other_width` wide, into a lane. The lane holds an empty pair
  // instead if an id is too large or padding stands before a token.
  template <class Id>
  Fit set(int lane, const Id* x, int64_t width, const Id* y, int64_t other_width, Code pad) {
    clear(lane);
    if (!narrow(x, width, x_[lane]) || !narrow(y, other_width, y_[lane])) return Fit::kTooLarge;
    const int64_t m = length<kRows>(x_[lane], width, pad), n = length<kTokens>(y_[lane], other_width, pad);
    if (m < 0 || n < 0) return Fit::kPadded;
    x_length_[lane] = m, y_length_[lane] = n;
    return Fit::kYes;
  }
  void clear(int lane) { x_length_[lane] = y_length_[lane] = 0; }

  int64_t x_length(int lane) const { return x_length_[lane]; }
  int64_t y_length(int lane) const { return y_length_[lane]; }

  // Bits of the tokens of x and y that the script keeps; afterwards, word by word.
  uint64_t kept_x(int lane, int w) const { return kept_x_[w][lane]; }
  uint64_t kept_y(int lane, int w) const { return kept_y_[w][lane]; }

  // The script of every lane: see trace_back.h for its rule.
  void align() {
    bool subsequences = true;
    for (int lane = 0; lane < kLanes && subsequences; ++lane) subsequences = align_subsequence(lane);
    if (subsequences) return;
    match();
    run_lcs();
    trace_back();
  }

  // Insertions and deletions of every lane.
  void indel_distances(int64_t* distances) {
    match();
    run_lcs();
    for (int lane = 0; lane < kLanes; ++lane) {
      int64_t common = 0;
      for (int w = 0; w < kWords; ++w) {
        common += popcount(~rows_[rows_used_][w][lane] & low_bits_of_word(y_length_[lane], w));
      }
      distances[lane] = x_length_[lane] + y_length_[lane] - 2 * common;
    }
  }

  // Unit-cost distances by Myers and Hyyrö; the letters are theirs (bit_parallel.h).
  void unit_cost_distances(int64_t* distances) {
    match();
    Lanes vp[kWords], vn[kWords], lengths;
    for (int w = 0; w < kWords; ++w) vp[w] = ~Lanes{}, vn[w] = Lanes{};
    std::memcpy(&lengths, x_length_, sizeof(lengths));
    for (int64_t i = 0; i < rows_used_; ++i) {
      const Lanes running = (Lanes)(lengths > static_cast<uint64_t>(i));
      Lanes hp_in = Lanes{} + 1, hn_in = {};
      for (int w = 0; w < kWords; ++w) {
        const Lanes match = rows_[i + 1][w] | hn_in;
        const Lanes d0 = (((match & vp[w]) + vp[w]) ^ vp[w]) | match | vn[w];
        const Lanes hp = vn[w] | ~(d0 | vp[w]), hn = d0 & vp[w];
        const Lanes hp_shifted = (hp << 1) | hp_in, hn_shifted = (hn << 1) | hn_in;
        hp_in = hp >> 63, hn_in = hn >> 63;
        // A sentence that has ended keeps its last row.
        vp[w] = (running & (hn_shifted | ~(d0 | hp_shifted))) | (~running & vp[w]);
        vn[w] = (running & (hp_shifted & d0)) | (~running & vn[w]);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      distances[lane] = x_length_[lane];
      for (int w = 0; w < kWords; ++w) {
        const uint64_t used = low_bits_of_word(y_length_[lane], w);
        distances[lane] += popcount(vp[w][lane] & used) - popcount(vn[w][lane] & used);
      }
    }
  }

 private:
  // Tokens before the padding at the end, or -1 if there is padding before one of them.
  template <int kMost>
  static int64_t length(const Code* row, int64_t width, Code pad) {
    constexpr int kMostWords = (kMost + 63) / 64;
    uint64_t pads[kMostWords];
    match_rows<kMost, 1>(&pad, 1, row, pads);
    int64_t length = 0;
    for (int w = 0; w < kMostWords; ++w) {
      const uint64_t tokens = ~pads[w] & low_bits_of_word(width, w);
      if (tokens == 0) continue;
      if (length < 64 * w || (tokens & (tokens + 1)) != 0) return -1;
      length = 64 * w + popcount(tokens);
    }
    return length;
  }

  // rows_[i + 1]: where x[i] stands in y; nowhere behind the end of x. Bits behind the end of y mean nothing: no bit
  // has an influence on a lower one.
  void match() {
    rows_used_ = 0;
    for (int lane = 0; lane < kLanes; ++lane) rows_used_ = std::max(rows_used_, x_length_[lane]);
    for (int lane = 0; lane < kLanes; ++lane) {
      match_rows<kTokens, kLanes>(x_[lane], x_length_[lane], y_[lane], reinterpret_cast<uint64_t*>(rows_[1]) + lane);
      for (int64_t i = x_length_[lane]; i < rows_used_; ++i) {
        for (int w = 0; w < kWords; ++w) reinterpret_cast<uint64_t*>(&rows_[i + 1][w])[lane] = 0;
      }
    }
  }

  // Whether x is a subsequence of y. If so its leftmost match is the script that the tie rule picks: every token is
  // kept as early as can be. Looks at 32 tokens of y at a time.
  bool align_subsequence(int lane) {
    const int64_t m = x_length_[lane], n = y_length_[lane];
    uint64_t kept[kWords] = {};
    int64_t i = 0;
    for (int64_t base = 0; i < m; base += 32) {
      if (n - base < m - i) return false;
      const Window window(y_[lane] + base);
      auto open = static_cast<uint32_t>(low_bits(n - base));  // behind the last match
      uint32_t found = 0;
      while (i < m) {
        const uint32_t match = window.match(x_[lane][i]) & open;
        if (match == 0) break;
        found |= match & -match;
        open &= ~(match ^ (match - 1));
        ++i;
      }
      kept[base / 64] |= uint64_t{found} << (base % 64);
    }
    for (int w = 0; w < kWords; ++w) reinterpret_cast<uint64_t*>(&kept_y_[w])[lane] = kept[w];
    for (int w = 0; w < kRowWords; ++w) reinterpret_cast<uint64_t*>(&kept_x_[w])[lane] = low_bits_of_word(m, w);
    return true;
  }

  struct Window {  // 32 tokens in registers
    explicit Window(const Code* y) { std::memcpy(tokens, y, sizeof(tokens)); }
    uint32_t match(Code token) const {
      auto bits = static_cast<uint32_t>(match_word<32>(Code{}, broadcast(token), tokens));
      asm("" : "+r"(bits));  // or GCC goes on in mask registers, whose moves take longer than all else
      return bits;
    }
#if defined(__SSE2__)
    Register tokens[32 * sizeof(Code) / sizeof(Register)];
#else
    Code tokens[32];
#endif
  };

  // Turns the masks into the rows of the LCS table: V' = (V + (V & M)) | (V & ~M).
  void run_lcs() {
    Lanes value[kWords];
    for (int w = 0; w < kWords; ++w) rows_[0][w] = value[w] = ~Lanes{};
    for (int64_t i = 1; i <= rows_used_; ++i) {
      LaneMask carry = {};
      for (int w = 0; w < kWords; ++w) {
        const Lanes match = rows_[i][w], common = value[w] & match;
        const Lanes sum = value[w] + common, with_carry = sum - (Lanes)carry;
        carry = (sum < common) | (with_carry < sum);
        rows_[i][w] = value[w] = with_carry | (value[w] & ~match);
      }
    }
  }

  void trace_back() {
    Lanes open[kWords], kept_x = {};  // open: the tokens of y in front of the walk
    all_of_y(open);
    for (int w = 0; w < kWords; ++w) kept_y_[w] = Lanes{};
    for (int w = 0; w < kRowWords; ++w) kept_x_[w] = Lanes{};
    for (int64_t i = rows_used_; i > 0; --i) {
      // Down to the last zero, all is inserted; then the token there is kept or x[i - 1] deleted.
      LaneMask found = {}, kept = {};
      for (int w = kWords - 1; w >= 0; --w) {
        Lanes last, up_to_last;
        highest(~rows_[i][w] & open[w], last, up_to_last);
        const Lanes keep = last & ~(Lanes)found & rows_[i - 1][w];
        open[w] = ((up_to_last & ~(Lanes)found) | (open[w] & (Lanes)found)) ^ keep;
        kept_y_[w] |= keep;
        found |= last != 0;
        kept |= keep != 0;
      }
      kept_x = kept_x + kept_x - (Lanes)kept;
      if ((i - 1) % 64 == 0) kept_x_[(i - 1) / 64] = kept_x, kept_x = Lanes{};
    }
  }

  void all_of_y(Lanes* words) const {
    for (int w = 0; w < kWords; ++w) {
      uint64_t bits[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) bits[lane] = low_bits_of_word(y_length_[lane], w);
      std::memcpy(&words[w], bits, sizeof(bits));
    }
  }

  // The highest bit of each word; and it with all below it.
  static void highest(const Lanes& word, Lanes& bit, Lanes& up_to_it) {
#if defined(__AVX512CD__)
    constexpr __mmask8 kAll = 0xFF;  // GCC 12 warns about the unmasked forms
    const __m512i above = _mm512_maskz_lzcnt_epi64(kAll, (__m512i)word);
    bit = (Lanes)_mm512_maskz_srlv_epi64(kAll, _mm512_set1_epi64(INT64_MIN), above);
    up_to_it = (Lanes)_mm512_maskz_srlv_epi64(kAll, _mm512_set1_epi64(-1), above);
#else
    up_to_it = word;
    for (int shift = 1; shift < 64; shift *= 2) up_to_it |= up_to_it >> shift;
    bit = up_to_it ^ (up_to_it >> 1);
#endif
  }

  Lanes rows_[kRows + 1][kWords];
  Lanes kept_x_[kRowWords], kept_y_[kWords];
  alignas(64) Code x_[kLanes][kRows];
  alignas(64) Code y_[kLanes][kTokens];
  int64_t x_length_[kLanes], y_length_[kLanes];
  int64_t rows_used_ = 0;
};

// Fills groups with the pairs of rows [begin, end), which first_row(pair) and second_row(pair) give, and calls
// done(group, first, lanes, fits): lane k has the pair `first` + k if fits[k]. Starts with codes of 16 bits.
template <int kTokens, class Arguments, class Done>
void for_groups(const Arguments& arguments, int64_t begin, int64_t end, const Done& done) {
  auto fill = [&](auto& group, auto pad, int64_t first, int lanes, bool* fits) {
    bool too_large = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      group.clear(lane);
      if (lane >= lanes || (too_large && sizeof(pad) == 2)) continue;
      const Fit fit = group.set(lane, arguments.first_row(first + lane), arguments.width,
                                arguments.second_row(first + lane), arguments.other_width, pad);
      fits[lane] = fit == Fit::kYes;
      too_large |= fit == Fit::kTooLarge;
    }
    return !too_large;
  };
  int64_t first = begin;
  const auto narrow_pad = static_cast<uint16_t>(arguments.pad_id);
  if (narrow_pad == arguments.pad_id) {
    Group<kTokens, uint16_t> group;
    for (; first < end; first += kLanes) {
      bool fits[kLanes] = {};
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, end - first));
      if (!fill(group, narrow_pad, first, lanes, fits)) break;
      done(group, first, lanes, fits);
    }
  }
  if (first >= end) return;
  Group<kTokens, int32_t> group;
  for (; first < end; first += kLanes) {
    bool fits[kLanes] = {};
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, end - first));
    fill(group, static_cast<int32_t>(arguments.pad_id), first, lanes, fits);
    done(group, first, lanes, fits);
  }
}

// Whether rows of these widths go in groups, and if so done: calls for_groups with the fewest words of bits.
template <class Arguments, class Done>
bool in_groups(const Arguments& arguments, int64_t begin, int64_t end, const Done& done) {
  if (arguments.pad_id != static_cast<int32_t>(arguments.pad_id)) return false;
  const int64_t longest = std::max((arguments.width + 1) / 2, arguments.other_width);
  if (longest <= 32) {
    for_groups<32>(arguments, begin, end, done);
  } else if (longest <= 64) {
    for_groups<64>(arguments, begin, end, done);
  } else if (longest <= 128) {
    for_groups<128>(arguments, begin, end, done);
  } else if (longest <= 256) {
    for_groups<256>(arguments, begin, end, done);
  } else if (longest <= 512 && end - begin >= kLanes / 2) {  // fewer pairs are faster one by one
    for_groups<512>(arguments, begin, end, done);
  } else {
    return false;
  }
  return true;
}

}  // namespace
