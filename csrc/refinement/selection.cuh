// Choosing the lowest keys of a row with one block of threads, without a sort: radix selection, eight bits at a time.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "common/cuda_utils.cuh"
#include "refinement/ranking.h"

namespace condgen_fast::refinement {

constexpr int kThreads = 256;
constexpr int kDigits = 256;
static_assert(kThreads == kDigits, "a thread for each digit");

using Scan = cub::BlockScan<long long, kThreads>;
using Reduce = cub::BlockReduce<long long, kThreads>;

struct Shared {
  union {
    Scan::TempStorage scan;
    Reduce::TempStorage reduce;
  };
  unsigned long long histogram[kDigits];
  unsigned long long counts[kDigits];
  unsigned digit;
  long long before, count_before;
  long long number;
};

// Where the chosen end: keys below `key` are chosen, and of those equal to it the first `ties` positions.
struct Cut {
  unsigned key;
  long long ties;
};

// The sum over the block, in all threads.
__device__ inline long long block_sum(long long value, Shared& shared) {
  const long long total = Reduce(shared.reduce).Sum(value);
  if (threadIdx.x == 0) shared.number = total;
  __syncthreads();
  const long long sum = shared.number;
  __syncthreads();
  return sum;
}

// key_of(i) is the key of position i, of those that are maskable; 1 <= count <= their number.
template <class Key>
__device__ Cut cut_after(long long count, const bool* maskable, int64_t width, const Key& key_of, Shared& shared) {
  unsigned prefix = 0, known = 0;  // the bits of the key found so far, and which they are
  for (int shift = 24; shift >= 0; shift -= 8) {
    shared.histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < width; i += kThreads) {
      if (!maskable[i]) continue;
      const unsigned key = key_of(i);
      if ((key & known) == prefix) atomicAdd(&shared.histogram[key >> shift & 0xff], 1ull);
    }
    __syncthreads();
    const long long here = static_cast<long long>(shared.histogram[threadIdx.x]);
    long long before;
    Scan(shared.scan).ExclusiveSum(here, before);
    if (before < count && count <= before + here) {
      shared.digit = threadIdx.x;
      shared.before = before;
    }
    __syncthreads();
    prefix |= shared.digit << shift;
    known |= 0xffu << shift;
    count -= shared.before;
    __syncthreads();
  }
  return {prefix, count};
}

// How many of the `open` maskable positions of a row the entropy policy allows: as long as the entropies before a
// position, in ascending order, fit the bound.
__device__ inline long long allowed_entropies(const float* entropy, const bool* maskable, int64_t width, float bound,
                                              long long open, Shared& shared) {
  if (!fits(0, bound)) return 0;
  unsigned prefix = 0, known = 0;
  long long units_before = 0, count_before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    shared.histogram[threadIdx.x] = shared.counts[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.digit = kDigits;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < width; i += kThreads) {
      if (!maskable[i]) continue;
      const unsigned key = surest_first(entropy[i]);
      if ((key & known) != prefix) continue;
      const unsigned digit = key >> shift & 0xff;
      atomicAdd(&shared.histogram[digit], static_cast<unsigned long long>(entropy_units(entropy[i])));
      atomicAdd(&shared.counts[digit], 1ull);
    }
    __syncthreads();
    const long long units = static_cast<long long>(shared.histogram[threadIdx.x]);
    const long long count = static_cast<long long>(shared.counts[threadIdx.x]);
    long long earlier_units, earlier_count;
    Scan(shared.scan).ExclusiveSum(units, earlier_units);
    __syncthreads();
    Scan(shared.scan).ExclusiveSum(count, earlier_count);
    // Sums do not fall along the digits, so it is one digit at most that begins within the bound and ends beyond.
    if (fits(units_before + earlier_units, bound) && !fits(units_before + earlier_units + units, bound)) {
      shared.digit = threadIdx.x;
      shared.before = earlier_units;
      shared.count_before = earlier_count;
    }
    __syncthreads();
    const unsigned digit = shared.digit;
    if (digit == kDigits) return open;  // all fit
    units_before += shared.before;
    count_before += shared.count_before;
    prefix |= digit << shift;
    known |= 0xffu << shift;
    if (shift > 0) {
      __syncthreads();
      continue;
    }
    // Equal keys have equal entropies: the lowest number of them that does not fit before another.
    const long long each = static_cast<long long>(shared.histogram[digit] / shared.counts[digit]);
    long long low = 1, high = static_cast<long long>(shared.counts[digit]);
    while (low < high) {
      const long long middle = low + (high - low) / 2;
      if (fits(units_before + middle * each, bound)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    count_before += low;
    __syncthreads();
  }
  return count_before;
}

// Calls write(i, chosen) for all positions: chosen are the `count` maskable ones of lowest key, ties to the lower one.
template <class Key, class Write>
__device__ void choose(long long count, long long open, const bool* maskable, int64_t width, const Key& key_of,
                       const Write& write, Shared& shared) {
  if (count <= 0 || count >= open) {
    for (int64_t i = threadIdx.x; i < width; i += kThreads) write(i, count > 0 && maskable[i]);
    return;
  }
  const Cut cut = cut_after(count, maskable, width, key_of, shared);
  long long ties = 0;
  for (int64_t first = 0; first < width; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const bool inside = i < width && maskable[i];
    const unsigned key = inside ? key_of(i) : 0;
    const bool tied = inside && key == cut.key;
    long long before, found;
    Scan(shared.scan).ExclusiveSum(tied ? 1 : 0, before, found);
    __syncthreads();
    if (i < width) write(i, inside && (key < cut.key || (tied && ties + before < cut.ties)));
    ties += found;
  }
}

}  // namespace condgen_fast::refinement
