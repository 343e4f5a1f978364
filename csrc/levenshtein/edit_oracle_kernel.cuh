// The edit oracle: greedy matching for subsequences, else the LCS table; then the labels, 32 at a time.
#pragma once

#include "levenshtein/warp.cuh"

namespace condgen_fast::levenshtein {
namespace {

// Words of 32 bits that a sentence needs: what is kept on either side, and the table.
CONDGEN_FAST_HOST_DEVICE inline int64_t oracle_words(int64_t width, int64_t other_width) {
  const int64_t words = (other_width + kWarp - 1) / kWarp;
  return (width + kWarp - 1) / kWarp + words + (width + 1) * words;
}

// Whether x is a subsequence of y; if so, sets the bits of its leftmost match, which is the script that the tie rule
// picks, `offset` bits behind their place.
template <class Id>
__device__ bool warp_match_subsequence(const Id* x, int64_t m, const Id* y, int64_t n, int64_t offset, uint32_t* kept_y,
                                       int lane) {
  int64_t i = 0;
  for (int64_t base = 0; i < m && n - base >= m - i; base += kWarp) {
    const bool there = base + lane < n;
    const Id token = there ? y[base + lane] : Id{0};
    unsigned open = kAll, kept = 0;  // tokens of these 32 behind the last match, and those matched
    while (i < m) {
      const unsigned match = __ballot_sync(kAll, there && token == x[i]) & open;
      if (match == 0) break;
      const unsigned lowest = match & (0u - match);
      kept |= lowest;
      open &= ~(lowest | (lowest - 1));
      ++i;
    }
    if (lane == 0) {  // they lie across two words
      const int shift = static_cast<int>((offset + base) % kWarp);
      uint32_t* word = kept_y + (offset + base) / kWarp;
      if (kept << shift != 0) word[0] |= kept << shift;
      if (shift > 0 && kept >> (kWarp - shift) != 0) word[1] |= kept >> (kWarp - shift);
    }
  }
  __syncwarp();
  return i == m;
}

// Rows of the LCS table of x and y from `row` on; returns the last one.
template <class Id>
__device__ uint32_t* warp_lcs(const Id* x, int64_t m, const Id* y, int64_t n, uint32_t* row, int lane) {
  const int64_t words = (n + kWarp - 1) / kWarp;
  warp_fill(row, words, ~0u, lane);
  for (int64_t i = 0; i < m; ++i, row += words) {
    const Id token = x[i];
    uint32_t carry = 0;
    for (int64_t first = 0; first < words; first += kWarp) {
      const int64_t word = first + lane;
      const uint32_t match = warp_match(token, y, n, first, words, lane);
      const uint32_t value = word < words ? row[word] : ~0u;
      const uint32_t next = warp_add(value, value & match, carry, lane) | (value & ~match);
      if (word < words) row[words + word] = next;
    }
  }
  __syncwarp();
  return row;
}

// labels[i] = whether bit i of `kept` is 0, for i < length; returns the number of bits that are 1.
__device__ int64_t warp_write_missing(const uint32_t* kept, int64_t length, int64_t width, bool* labels, int lane) {
  int64_t count = 0;
  for (int64_t base = 0; base < width; base += kWarp) {
    const uint32_t word = base < length ? kept[base / kWarp] : 0;
    count += __popc(word);
    const int64_t i = base + lane;
    if (i < width) labels[i] = i < length && ((word >> lane) & 1) == 0;
  }
  return count;
}

// Counts the insertions in their slots (script.h); those in front of the first and behind the last kept token have
// none.
__device__ void warp_write_insertions(const uint32_t* kept_x, int64_t m, const uint32_t* kept_y, int64_t n,
                                      bool source_slots, int64_t slot_width, int64_t* insert, int lane) {
  warp_fill(insert, slot_width, int64_t{0}, lane);
  __syncwarp();
  int64_t rank = 0, last = -1;  // kept tokens in front of this word, and the place of the last of them
  int64_t in_front = 0;         // insertions in front of the first kept token
  for (int64_t base = 0; base < n; base += kWarp) {
    const uint32_t word = kept_y[base / kWarp], below = word & ((1u << lane) - 1);
    if ((word >> lane) & 1) {
      const int64_t own_rank = rank + __popc(below);
      const int64_t before = below == 0 ? last : base + kWarp - 1 - __clz(static_cast<int>(below));
      if (own_rank > 0) insert[own_rank - 1] = base + lane - before - 1;
    }
    if (word != 0) {
      if (rank == 0) in_front = base + __ffs(static_cast<int>(word)) - 1;
      last = base + kWarp - 1 - __clz(static_cast<int>(word));
      rank += __popc(word);
    }
  }
  if (!source_slots) return;
  // From the slot in front of the kept token of a rank to that in front of its place, which is never a lower one: from
  // the end on, no count is overwritten before it is read.
  __syncwarp();
  for (int64_t base = m == 0 ? -1 : (m - 1) / kWarp * kWarp; base >= 0; base -= kWarp) {
    const uint32_t word = kept_x[base / kWarp];
    rank -= __popc(word);
    const int64_t own_rank = rank + __popc(word & ((1u << lane) - 1)), i = base + lane;
    int64_t count = 0;
    if ((word >> lane) & 1) count = own_rank == 0 ? in_front : insert[own_rank - 1];
    __syncwarp();
    if (i > 0 && i <= slot_width) insert[i - 1] = count;
    __syncwarp();
  }
}

// scratch: oracle_words() for each sentence, or null where shared memory has them.
template <class Id>
__global__ void __launch_bounds__(kWarp)
    edit_oracle_kernel(OracleArguments<Id> arguments, uint32_t* scratch, int64_t scratch_words) {
  extern __shared__ uint32_t shared[];
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int64_t width = arguments.width, other_width = arguments.other_width;
  const Id* x = arguments.first_row(b);
  const Id* y = arguments.second_row(b);
  const int64_t m = warp_length(x, width, arguments.pad_id, lane);
  const int64_t n = warp_length(y, other_width, arguments.pad_id, lane);
  const int64_t offset = warp_common_prefix(x, m, y, n, lane);

  uint32_t* kept_x = scratch == nullptr ? shared : scratch + b * scratch_words;
  uint32_t* kept_y = kept_x + (width + kWarp - 1) / kWarp;
  uint32_t* table = kept_y + (other_width + kWarp - 1) / kWarp;
  auto first_bits = [&](uint32_t* kept, int64_t bits, int64_t count) {  // `count` ones in all the words of a side
    for (int64_t word = lane; word * kWarp < bits; word += kWarp) {
      const int64_t ones = count - word * kWarp;
      kept[word] = ones >= kWarp ? ~0u : ones > 0 ? (1u << ones) - 1 : 0u;
    }
    __syncwarp();
  };
  first_bits(kept_x, width, offset);
  first_bits(kept_y, other_width, offset);
  if (warp_match_subsequence(x + offset, m - offset, y + offset, n - offset, offset, kept_y, lane)) {
    first_bits(kept_x, width, m);
  } else {
    first_bits(kept_y, other_width, offset);
    TableRows rows{warp_lcs(x + offset, m - offset, y + offset, n - offset, table, lane),
                   (n - offset + kWarp - 1) / kWarp};
    if (lane == 0) trace_back(rows, m - offset, n - offset, offset, kept_x, kept_y);
    __syncwarp();
  }

  const int64_t slot_width = width > 0 ? width - 1 : 0;
  const int64_t kept = warp_write_missing(kept_x, m, width, arguments.delete_labels + b * width, lane);
  warp_write_missing(kept_y, n, other_width, arguments.masked + b * other_width, lane);
  warp_write_insertions(kept_x, m, kept_y, n, arguments.source_slots, slot_width, arguments.insert + b * slot_width,
                        lane);
  if (lane == 0) arguments.distance[b] = m + n - 2 * kept;
}

}  // namespace
}  // namespace condgen_fast::levenshtein
