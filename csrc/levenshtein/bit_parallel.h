// Bit-parallel LCS and Levenshtein distance of one pair of sentences of any length on the CPU. y lies along the bits,
// 64 tokens a word; x gives the rows. Symbols are hashed, so ids may be any integers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "levenshtein/lanes.h"
#include "levenshtein/trace_back.h"

namespace {

// Uninitialised memory that grows and is kept between sentences.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* reserve(int64_t size) {
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<T*>(std::malloc(sizeof(T) * size));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = size;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t hash_bits(int64_t size) {  // a table twice the size, 128 slots at least
  int64_t bits = 7;
  while ((int64_t{1} << bits) < 2 * size) ++bits;
  return bits;
}

// Multiplicative hashing (Knuth, The Art of Computer Programming 3, 6.4) with linear probing.
template <class Id>
inline uint64_t first_probe(Id id, int64_t bits) {
  return (static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u) >> (64 - bits);
}

// Where each symbol stands in y: for each the words it stands in, ascending, with their masks. O(n) memory.
template <class Id>
class Occurrences {
 public:
  struct Entry {
    uint64_t mask;
    int32_t word;
    int32_t next;  // -1 at the end
  };

  void build(const Id* y, int64_t n) {
    bits_ = hash_bits(n);
    keys_.reserve(int64_t{1} << bits_);
    heads_.reserve(int64_t{1} << bits_);
    counts_.reserve(int64_t{1} << bits_);
    entries_.reserve(n);
    std::memset(heads_.data(), 0xFF, sizeof(int32_t) << bits_);
    int32_t used = 0;
    for (int64_t j = n - 1; j >= 0; --j) {
      const int64_t slot = probe(y[j]);
      int32_t& head = heads_.data()[slot];
      const int32_t word = static_cast<int32_t>(j / 64);
      if (head < 0) {
        keys_.data()[slot] = y[j];
        counts_.data()[slot] = 0;
      }
      if (head < 0 || entries_.data()[head].word != word) {
        entries_.data()[used] = {0, word, head};
        head = used++;
        ++counts_.data()[slot];
      }
      entries_.data()[head].mask |= uint64_t{1} << (j % 64);
    }
  }
  // The symbol's number, or -1 if it does not stand in y.
  int32_t find(Id id) const {
    const int64_t slot = probe(id);
    return heads_.data()[slot] < 0 ? -1 : static_cast<int32_t>(slot);
  }
  int32_t word_count(int32_t symbol) const { return counts_.data()[symbol]; }
  int32_t first(int32_t symbol) const { return symbol < 0 ? -1 : heads_.data()[symbol]; }
  const Entry& entry(int32_t index) const { return entries_.data()[index]; }

 private:
  int64_t probe(Id id) const {
    uint64_t slot = first_probe(id, bits_);
    while (heads_.data()[slot] >= 0 && keys_.data()[slot] != id) slot = (slot + 1) & ((uint64_t{1} << bits_) - 1);
    return slot;
  }
  int64_t bits_ = 0;
  Buffer<Id> keys_;
  Buffer<int32_t> heads_;
  Buffer<int32_t> counts_;
  Buffer<Entry> entries_;
};

// One row of bit-parallel LCS on a word: V' = (V + (V & M)) | (V & ~M), with the carry in and out.
inline uint64_t lcs_word(uint64_t value, uint64_t mask, bool& carry) {
  const uint64_t sum = value + (value & mask);
  const uint64_t with_carry = sum + carry;
  carry = sum < value || with_carry < sum;
  return with_carry | (value & ~mask);
}

// Rows of the LCS table of any y but an empty one. Only the last row is held; a log of the words that each row changed
// leads back. A row in which few words change logs those, any other the whole row before it: never more than one bit a
// cell.
template <class Id>
class LongLcs {
 public:
  template <bool kLog>
  int64_t run(const Id* x, int64_t m, const Id* y, int64_t n) {
    occurrences_.build(y, n);
    words_ = (n + 63) / 64;
    std::memset(state_.reserve(words_), 0xFF, 8 * words_);
    if (kLog) reserve_log(x, m);
    int64_t end = 0;  // words from here on are all ones
    for (int64_t i = 0; i < m; ++i) {
      const int32_t symbol = kLog ? symbols_.data()[i] : occurrences_.find(x[i]);
      if (symbol < 0) continue;
      const bool whole = kLog && logs_whole_row(symbol);
      if (whole) {
        std::memcpy(values_.data() + logged_values_, state_.data(), 8 * words_);
        logged_values_ += words_;
      }
      const int64_t before = logged_words_;
      update(symbol, kLog && !whole, end);
      if (kLog) changes_.data()[i] = static_cast<int32_t>(logged_words_ - before);
    }
    row_ = m;
    int64_t length = 0;
    for (int64_t w = 0; w < end; ++w) length += popcount(~state_.data()[w]);
    return length;
  }
  const uint64_t* state() const { return state_.data(); }
  void step_back() {
    const int32_t symbol = symbols_.data()[--row_];
    if (symbol < 0) return;
    if (logs_whole_row(symbol)) {
      logged_values_ -= words_;
      std::memcpy(state_.data(), values_.data() + logged_values_, 8 * words_);
      return;
    }
    for (int32_t k = changes_.data()[row_]; k > 0; --k) {
      state_.data()[logged_at_.data()[--logged_words_]] = values_.data()[--logged_values_];
    }
  }

 private:
  // A logged word takes 12 bytes and each word with occurrences changes at most one other, so that the log is the
  // larger one beyond a third of the words; up to 8 words a row its size does not matter and it is faster.
  bool logs_whole_row(int32_t symbol) const {
    return words_ > 8 && 3 * int64_t{occurrences_.word_count(symbol)} > words_;
  }

  void reserve_log(const Id* x, int64_t m) {
    symbols_.reserve(m);
    changes_.reserve(m);
    logged_values_ = logged_words_ = 0;
    int64_t values = 0, words = 0;
    for (int64_t i = 0; i < m; ++i) {
      const int32_t symbol = symbols_.data()[i] = occurrences_.find(x[i]);
      if (symbol < 0) continue;
      if (logs_whole_row(symbol)) {
        values += words_;
      } else {
        const int64_t changes = 2 * occurrences_.word_count(symbol);
        values += changes < words_ ? changes : words_;
        words += changes < words_ ? changes : words_;
      }
    }
    values_.reserve(values);
    logged_at_.reserve(words);
  }

  // The words without an occurrence change only where a carry ends: at the lowest zero bit behind it.
  void update(int32_t symbol, bool log, int64_t& end) {
    uint64_t* state = state_.data();
    bool carry = false;
    int64_t word = 0;
    int32_t next = occurrences_.first(symbol);
    while (next >= 0) {
      const auto& entry = occurrences_.entry(next);
      absorb(state, word, entry.word < end ? entry.word : end, carry, log);
      write(state, entry.word, lcs_word(state[entry.word], entry.mask, carry), log);
      word = entry.word + 1;
      next = entry.next;
    }
    absorb(state, word, end, carry, log);
    if (word > end) end = word;
  }
  void absorb(uint64_t* state, int64_t word, int64_t stop, bool& carry, bool log) {
    for (; carry && word < stop; ++word) {
      if (state[word] == ~uint64_t{0}) continue;
      write(state, word, state[word] | (state[word] + 1), log);
      carry = false;
    }
  }
  void write(uint64_t* state, int64_t word, uint64_t value, bool log) {
    if (value == state[word]) return;
    if (log) {
      values_.data()[logged_values_++] = state[word];
      logged_at_.data()[logged_words_++] = static_cast<int32_t>(word);
    }
    state[word] = value;
  }

  Occurrences<Id> occurrences_;
  Buffer<uint64_t> state_;
  Buffer<int32_t> symbols_;    // [m] the symbol of each row, -1 where it does not stand in y
  Buffer<int32_t> changes_;    // [m] words logged by each row
  Buffer<uint64_t> values_;    // what the words held before
  Buffer<int32_t> logged_at_;  // which words, for rows not logged whole
  int64_t words_ = 0, row_ = 0, logged_values_ = 0, logged_words_ = 0;
};

// Unit-cost distance by Myers, "A Fast Bit-Vector Algorithm for Approximate String Matching" (1999), in the blocks of
// Hyyrö, "A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances" (2003); his letters. n > 0.
template <class Id>
class UnitCost {
 public:
  // kLog keeps D0 and VN of every row for the walk back.
  template <bool kLog>
  int64_t run(const Id* x, int64_t m, const Id* y, int64_t n) {
    occurrences_.build(y, n);
    words_ = (n + 63) / 64;
    uint64_t* vp = vp_.reserve(words_);
    uint64_t* vn = vn_.reserve(kLog ? (m + 1) * words_ : words_);
    uint64_t* d0_row = kLog ? d0_.reserve(m * words_) : nullptr;
    std::memset(vp, 0xFF, 8 * words_);
    std::memset(vn, 0, 8 * words_);
    const int64_t last_bit = (n - 1) % 64;
    int64_t distance = n;
    for (int64_t i = 0; i < m; ++i) {
      int32_t next = occurrences_.first(occurrences_.find(x[i]));
      uint64_t* vn_below = kLog ? vn + words_ : vn;
      uint64_t hp_in = 1, hn_in = 0;  // the row above y's first token grows by one
      for (int64_t w = 0; w < words_; ++w) {
        uint64_t match = 0;
        if (next >= 0 && occurrences_.entry(next).word == w) {
          match = occurrences_.entry(next).mask;
          next = occurrences_.entry(next).next;
        }
        const uint64_t d0 = ((((match | hn_in) & vp[w]) + vp[w]) ^ vp[w]) | match | hn_in | vn[w];
        const uint64_t hp = vn[w] | ~(d0 | vp[w]);
        const uint64_t hn = d0 & vp[w];
        if (w == words_ - 1) distance += static_cast<int64_t>((hp >> last_bit) & 1) - ((hn >> last_bit) & 1);
        const uint64_t hp_shifted = (hp << 1) | hp_in;
        const uint64_t hn_shifted = (hn << 1) | hn_in;
        hp_in = hp >> 63;
        hn_in = hn >> 63;
        vp[w] = hn_shifted | ~(d0 | hp_shifted);
        vn_below[w] = hp_shifted & d0;
        if (kLog) d0_row[w] = d0;
      }
      vn = vn_below;
      if (kLog) d0_row += words_;
    }
    return distance;
  }

  struct Rows {
    const uint64_t* row;
    int64_t words;
    const uint64_t* state() const { return row; }
    void step_back() { row -= words; }
  };
  Rows d0(int64_t row) const { return {d0_.data() + (row - 1) * words_, words_}; }  // rows 1 .. m
  Rows vn(int64_t row) const { return {vn_.data() + row * words_, words_}; }        // rows 0 .. m

 private:
  Occurrences<Id> occurrences_;
  Buffer<uint64_t> vp_, vn_, d0_;
  int64_t words_ = 0;
};

}  // namespace
