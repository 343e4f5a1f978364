#include <cstring>

#include "levenshtein/bit_parallel.h"
#include "levenshtein/lanes.h"
#include "levenshtein/levenshtein.h"
#include "levenshtein/rows.h"
#include "levenshtein/script.h"

namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA {

namespace {

template <class Id>
void write_labels(const OracleArguments<Id>& arguments, int64_t b, const uint64_t* kept_x, int64_t m,
                  const uint64_t* kept_y, int64_t n, int64_t kept, BadRows& bad) {
  const int64_t width = arguments.width, slot_width = width > 0 ? width - 1 : 0;
  write_missing(kept_x, m, width, arguments.delete_labels + b * width);
  write_missing(kept_y, n, arguments.other_width, arguments.masked + b * arguments.other_width);
  arguments.distance[b] = m + n - 2 * kept;
  const bool inside = write_insertions(kept_x, m, kept_y, n, kept, arguments.source_slots, slot_width,
                                       arguments.insert + b * slot_width);
  if (!inside) lower(bad.other, b);
}

// One pair of any length and any ids at a time.
template <class Id>
class AnyLength {
 public:
  void label(const OracleArguments<Id>& arguments, int64_t b, BadRows& bad) {
    const Id* x = arguments.first_row(b);
    const Id* y = arguments.second_row(b);
    const Extent extent_x = extent(x, arguments.width, arguments.pad_id);
    const Extent extent_y = extent(y, arguments.other_width, arguments.pad_id);
    if (extent_x.padded) lower(bad.padded_first, b);
    if (extent_y.padded) lower(bad.padded_second, b);
    if (extent_x.padded || extent_y.padded) return;

    uint64_t* kept_x = cleared(kept_x_, extent_x.length);
    uint64_t* kept_y = cleared(kept_y_, extent_y.length);
    // Only the prefix may be cut: the tie rule does not always match a common suffix with itself.
    const int64_t offset = common_prefix(x, extent_x.length, y, extent_y.length);
    set_first(kept_x, offset);
    set_first(kept_y, offset);
    const int64_t m = extent_x.length - offset, n = extent_y.length - offset;
    x += offset;
    y += offset;
    int64_t kept = offset;
    if (mark_subsequence(x, m, y, n, offset, kept_y)) {
      kept += m;
      set_first(kept_x, extent_x.length);
    } else if (n > 0) {
      set_first(cleared(kept_y_, extent_y.length), offset);
      kept += lcs_.template run<true>(x, m, y, n);
      trace_back(lcs_, m, n, offset, kept_x, kept_y);
    }
    write_labels(arguments, b, kept_x, extent_x.length, kept_y, extent_y.length, kept, bad);
  }

 private:
  static uint64_t* cleared(Buffer<uint64_t>& bits, int64_t size) {
    const int64_t words = size / 64 + 1;
    std::memset(bits.reserve(words), 0, 8 * words);
    return bits.data();
  }
  static void set_first(uint64_t* bits, int64_t count) {
    std::memset(bits, 0xFF, count / 64 * 8);
    if (count % 64 > 0) bits[count / 64] |= low_bits(count % 64);
  }
  // Whether x is a subsequence of y. If so its leftmost match is the script that the tie rule picks: every token is
  // kept as early as can be.
  static bool mark_subsequence(const Id* x, int64_t m, const Id* y, int64_t n, int64_t offset, uint64_t* kept_y) {
    int64_t i = 0;
    for (int64_t j = 0; i < m && n - j >= m - i; ++j) {
      const bool equal = x[i] == y[j];
      kept_y[(offset + j) / 64] |= uint64_t{equal} << ((offset + j) % 64);
      i += equal;
    }
    return i == m;
  }

  LongLcs<Id> lcs_;
  Buffer<uint64_t> kept_x_, kept_y_;
};

}  // namespace

template <class Id>
BadRows edit_oracle(const OracleArguments<Id>& arguments, int64_t begin, int64_t end) {
  BadRows bad;
  AnyLength<Id> any_length;
  const bool done = in_groups(arguments, begin, end, [&](auto& group, int64_t first, int lanes, const bool* fits) {
    group.align();
    for (int lane = 0; lane < lanes; ++lane) {
      if (!fits[lane]) {
        any_length.label(arguments, first + lane, bad);
        continue;
      }
      uint64_t kept_x[group.kRowWords], kept_y[group.kWords];
      int64_t kept = 0;
      for (int w = 0; w < group.kRowWords; ++w) kept_x[w] = group.kept_x(lane, w);
      for (int w = 0; w < group.kWords; ++w) kept += popcount(kept_y[w] = group.kept_y(lane, w));
      write_labels(arguments, first + lane, kept_x, group.x_length(lane), kept_y, group.y_length(lane), kept, bad);
    }
  });
  if (!done) {
    for (int64_t b = begin; b < end; ++b) any_length.label(arguments, b, bad);
  }
  return bad;
}

template BadRows edit_oracle(const OracleArguments<int32_t>&, int64_t, int64_t);
template BadRows edit_oracle(const OracleArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA
