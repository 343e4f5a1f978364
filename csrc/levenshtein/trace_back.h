// The walk from the end of the edit script to its front, for one sentence; shared by the CPU and CUDA kernels.
//
// Bit j of row i (`state`) is 0 where LCS(x[:i], y[:j+1]) > LCS(x[:i], y[:j]) and 1 where they are equal, which is the
// vector V of bit-parallel LCS (Hyyrö, "Bit-Parallel LCS-length Computation Revisited", AWOCA 2004). With costs insert
// 1, delete 1 and no substitution, these bits alone decide "insert, else delete, else keep" at the cell (i, j):
//   insert  if bit j-1 of row i is 1,
//   delete  else if j is 0 or bit j-1 of row i-1 is 0,
//   keep    else.
#pragma once

#include "levenshtein/levenshtein.h"

// Unnamed on purpose: the including file is compiled once per instruction set, and no copy may stand in for another.
namespace {

template <class Word>
CONDGEN_FAST_HOST_DEVICE inline int64_t bit_width(Word word) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(word));
#else
  return word == 0 ? 0 : 64 - __builtin_clzll(static_cast<unsigned long long>(word));
#endif
}

// The largest k <= j for which bit k-1 of the row is 0, or 0.
template <class Word>
CONDGEN_FAST_HOST_DEVICE inline int64_t last_zero(const Word* state, int64_t j) {
  constexpr int64_t bits = 8 * sizeof(Word);
  if (j == 0) return 0;
  int64_t word = (j - 1) / bits;
  Word zeros = ~state[word] & (~Word{0} >> (bits - 1 - (j - 1) % bits));
  while (zeros == 0) {
    if (word == 0) return 0;
    zeros = ~state[--word];
  }
  return word * bits + bit_width(zeros);
}

template <class Word>
CONDGEN_FAST_HOST_DEVICE inline bool is_one(const Word* state, int64_t j) {
  constexpr int64_t bits = 8 * sizeof(Word);
  return (state[j / bits] >> (j % bits)) & 1;
}

template <class Word>
CONDGEN_FAST_HOST_DEVICE inline void set_bit(Word* bits, int64_t i) {
  constexpr int64_t width = 8 * sizeof(Word);
  bits[i / width] |= Word{1} << (i % width);
}

// rows.state() is the current row, first row m, and rows.step_back() goes from row i to row i-1. Sets the bits of the
// tokens that stay (script.h), `offset` bits behind their place in x and y.
template <class Rows, class Word>
CONDGEN_FAST_HOST_DEVICE inline void trace_back(Rows& rows, int64_t m, int64_t n, int64_t offset, Word* kept_x,
                                                Word* kept_y) {
  int64_t j = n;
  for (int64_t i = m; i > 0 && j > 0; --i) {
    j = last_zero(rows.state(), j);
    rows.step_back();
    if (j == 0 || !is_one(rows.state(), j - 1)) continue;
    set_bit(kept_x, offset + i - 1);
    set_bit(kept_y, offset + --j);
  }
}

// The cheapest unit-cost alignment, found from the end with "pair, else delete, else insert". d0.state()[j] is 1 where
// the cell (i, j + 1) costs what (i-1, j) does, vn.state()[j] where it costs one less than (i, j); both are rows that
// step_back() as above, d0 from row m and vn from row m-1. Writes the steps downward from the two ends and returns how
// many there are: a token of x or the gap, a token of y or the gap.
template <class Rows, class Id>
CONDGEN_FAST_HOST_DEVICE inline int64_t trace_alignment(Rows& d0, Rows& vn, const Id* x, int64_t m, const Id* y,
                                                        int64_t n, Id gap, Id* x_end, Id* y_end) {
  int64_t steps = 0;
  int64_t i = m, j = n;
  while (i > 0 || j > 0) {
    const bool pair = i > 0 && j > 0 && (x[i - 1] == y[j - 1] || !is_one(d0.state(), j - 1));
    const bool from_x = pair || j == 0 || (i > 0 && is_one(vn.state(), j - 1));
    const bool from_y = pair || !from_x;
    ++steps;
    *--x_end = from_x ? x[i - 1] : gap;
    *--y_end = from_y ? y[j - 1] : gap;
    j -= from_y;
    if (!from_x) continue;
    if (--i == 0) continue;
    d0.step_back();
    vn.step_back();
  }
  return steps;
}

}  // namespace
