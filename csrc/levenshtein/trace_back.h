// The walk from the end of the edit script to its front, for one sentence; shared by the CPU and CUDA kernels.
//
// Bit j of row i (`state`) is 0 where LCS(x[:i], y[:j+1]) > LCS(x[:i], y[:j]) and 1 where they are equal, which is the
// vector V of bit-parallel LCS (Hyyrö, "Bit-Parallel LCS-length Computation Revisited", AWOCA 2004). With costs insert
// 1, delete 1 and no substitution, these bits alone decide "insert, else delete, else keep" at the cell (i, j):
//   insert  if bit j-1 of row i is 1,
//   delete  else if j is 0 or bit j-1 of row i-1 is 0,
//   keep    else.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CONDGEN_FAST_HOST_DEVICE __host__ __device__
#else
#define CONDGEN_FAST_HOST_DEVICE
#endif

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

// Writes the labels of one sentence, steps coming last first. The three rows are zero at the start.
struct LabelWriter {
  bool* delete_row;     // [S]
  int64_t* insert_row;  // [S-1]
  bool* masked_row;     // [T]
  int64_t last_slot;    // slots are 0 .. last_slot-1
  int64_t kept;         // tokens that stay among those in front of the walk
  bool source_slots;
  bool outside;  // an insertion had no slot

  // target[from:to] goes in behind the first `passed` tokens.
  CONDGEN_FAST_HOST_DEVICE void insert(int64_t passed, int64_t from, int64_t to) {
    if (from == to) return;
    for (int64_t j = from; j < to; ++j) masked_row[j] = true;
    const int64_t slot = (source_slots ? passed : kept) - 1;
    if (slot < 0 || slot >= last_slot) {
      outside = true;
    } else {
      insert_row[slot] += to - from;
    }
  }
};

// rows.state() is the current row, first row m, and rows.step_back() goes from row i to row i-1.
// offset: length of the common prefix that was cut from both sentences.
template <class Rows>
CONDGEN_FAST_HOST_DEVICE inline void trace_back(Rows& rows, int64_t m, int64_t n, int64_t offset, LabelWriter& labels) {
  int64_t j = n;
  for (int64_t i = m; i > 0; --i) {
    const int64_t kept_end = last_zero(rows.state(), j);
    labels.insert(offset + i, offset + kept_end, offset + j);
    j = kept_end;
    rows.step_back();
    if (j > 0 && is_one(rows.state(), j - 1)) {
      --labels.kept;
      --j;
    } else {
      labels.delete_row[offset + i - 1] = true;
    }
  }
  labels.insert(offset, offset, offset + j);
}

}  // namespace
