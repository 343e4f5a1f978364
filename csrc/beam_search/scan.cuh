// beam_topk, first: a block of threads for each piece of a row, which leaves its candidates, best first.
//
// A block keeps the candidates above a threshold in shared memory, as unordered as its threads find them, and ranks
// them against each other when they have become too many.
#pragma once

#include "sections.cuh"

namespace condgen_fast::beam_search {
namespace {

// A thread's share of a tile. Elements beyond the end, and NaN, are -inf.
template <class Logit, bool kAligned>
struct Share {
  static constexpr int kPack = 16 / sizeof(Logit);  // what one load brings
  float x[kPerThread];

  // Position of element e in the tile; ascending in e.
  static __device__ int position(int e) {
    return e / kPack * kThreads * kPack + static_cast<int>(threadIdx.x) * kPack + e % kPack;
  }

  __device__ void load(const Logit* row, int64_t tile, int64_t end) {
#pragma unroll
    for (int first = 0; first < kPerThread; first += kPack) {
      const int64_t from = tile + position(first);
      if (kAligned && from + kPack <= end) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + from));
        const Logit* values = reinterpret_cast<const Logit*>(&raw);
#pragma unroll
        for (int i = 0; i < kPack; ++i) x[first + i] = static_cast<float>(values[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          x[first + i] = from + i < end ? static_cast<float>(row[from + i]) : minus_infinity();
        }
      }
    }
#pragma unroll
    for (float& value : x) value = value == value ? value : minus_infinity();
  }
};

// Keys above which k candidates are known to be, and those found so far.
struct Best {
  Candidate* keys;    // [k + kSpare + kTile] shared
  Candidate* sorted;  // [max(k, kThreads)] shared
  int* count;         // shared
  int k;

  // Leaves the k best in `sorted`, descending, and returns how many there are. Keys are different from each other.
  __device__ int rank() const {
    const int found = *count;
    for (int i = threadIdx.x; i < found; i += kThreads) {
      const Candidate mine = keys[i];
      int above = 0;
      for (int j = 0; j < found; ++j) above += keys[j] > mine;
      if (above < k) sorted[above] = mine;
    }
    __syncthreads();
    return found < k ? found : k;
  }

  // Keeps the k best only and returns the last of them.
  __device__ Candidate prune() const {
    const int kept = rank();
    for (int i = threadIdx.x; i < kept; i += kThreads) keys[i] = sorted[i];
    if (threadIdx.x == 0) *count = kept;
    __syncthreads();
    return sorted[kept - 1];
  }
};

// The k-th highest of the threads' keys, if there are k threads: at least k candidates are not below it.
__device__ Candidate first_bound(Candidate mine, Candidate* shared, int k) {
  if (k > kThreads) return 0;
  shared[threadIdx.x] = mine;
  __syncthreads();
  int above = 0;
  for (int j = 0; j < kThreads; ++j) above += shared[j] > mine || (shared[j] == mine && j < threadIdx.x);
  __syncthreads();
  if (above == k - 1) shared[0] = mine;
  __syncthreads();
  const Candidate bound = shared[0];
  __syncthreads();
  return bound;
}

// Writes what the section of all threads comes to: its highest logit, its sum of 2^((logit - highest) * scale).
__device__ void finish_section(float highest, float sum, float scale, float* shared, float* out_highest,
                               float* out_sum) {
  constexpr int kWarps = kThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float warp_top = warp_max(highest);
  if (lane == 0) shared[warp] = warp_top;
  __syncthreads();
  float top = shared[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) top = shared[i] > top ? shared[i] : top;
  const float part = highest > minus_infinity() ? sum * exp2f((highest - top) * scale) : 0.0f;
  const float warp_total = warp_sum(part);
  if (lane == 0) shared[kWarps + warp] = warp_total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += shared[kWarps + i];
    *out_highest = top;
    *out_sum = total;
  }
}

template <class Logit, bool kAligned>
__global__ void __launch_bounds__(kThreads) scan_kernel(Arguments<Logit> arguments, Sections sections) {
  extern __shared__ Candidate candidates[];
  __shared__ float partial[2 * kThreads / kWarpSize];
  __shared__ int count;
  const int64_t row = blockIdx.x / sections.pieces, piece = blockIdx.x % sections.pieces;
  if (!isfinite(arguments.scores[row])) return;
  const int k = static_cast<int>(sections.kept);
  Best best{candidates, candidates + k + kSpare + kTile, &count, k};
  if (threadIdx.x == 0) count = 0;
  __syncthreads();

  const Logit* logits = arguments.logits + row / arguments.beams * arguments.sentence_stride +
                        row % arguments.beams * arguments.beam_stride;
  const Lists<Logit> lists(arguments, row / arguments.beams, row % arguments.beams);
  const int64_t begin = piece * sections.per_piece * kSection;
  const int64_t end = min(begin + sections.per_piece * kSection, arguments.vocab);
  Candidate threshold = 0;
  float highest = minus_infinity(), sum = 0.0f;
  Share<Logit, kAligned> next;
  next.load(logits, begin, end);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const Share<Logit, kAligned> share = next;
    if (tile + kTile < end) next.load(logits, tile + kTile, end);

    float top = highest;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) top = share.x[e] > top ? share.x[e] : top;
    if (top > minus_infinity()) {
      if (highest > minus_infinity()) sum *= exp2f((highest - top) * arguments.power_scale);
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) sum += exp2f((share.x[e] - top) * arguments.power_scale);
      highest = top;
    }

    if (tile == begin && !lists.restricted) {
      float value = share.x[0];
      int place = 0;
#pragma unroll
      for (int e = 1; e < kPerThread; ++e) {
        if (share.x[e] > value) {
          value = share.x[e];
          place = e;
        }
      }
      const int64_t token = tile + share.position(place);
      const bool counts = token < end && value > minus_infinity() && !lists.is_adjusted(token);
      const Candidate bound = first_bound(counts ? candidate(value, token) : 0, best.sorted, k);
      threshold = bound > 0 ? bound - 1 : 0;  // the bound's logit, as its low half is never 0
    }
    const float least = lists.restricted ? -minus_infinity()
                        : threshold > 0  ? logit_of(threshold)
                                         : __int_as_float(0xff7fffff);  // the lowest number
    int pushed = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (share.x[e] >= least && share.x[e] < -minus_infinity()) {
        const int64_t token = tile + share.position(e);
        const Candidate key = candidate(share.x[e], token);
        if (key > threshold && !lists.is_adjusted(token)) {
          best.keys[atomicAdd(&count, 1)] = key;
          pushed = 1;
        }
      }
    }
    if (__syncthreads_or(pushed)) {
      const int found = count;
      __syncthreads();
      if (found > k + kSpare) threshold = best.prune();
    }

    const int64_t read = tile + kTile;
    if ((read - begin) % kSection == 0 || read >= end) {
      const int64_t section = row * sections.per_row + tile / kSection;
      finish_section(highest, sum, arguments.power_scale, partial, sections.highest + section, sections.sums + section);
      highest = minus_infinity();
      sum = 0.0f;
    }
  }

  for (int64_t first = 0; first < lists.allowed_count; first += kThreads) {
    const int64_t token = first + threadIdx.x < lists.allowed_count ? lists.allowed[first + threadIdx.x] : -1;
    int pushed = 0;
    if (token >= begin && token < end && !lists.is_adjusted(token)) {
      const Candidate key = candidate(static_cast<float>(logits[token]), token);
      if (logit_of(key) > minus_infinity() && key > threshold) {
        best.keys[atomicAdd(&count, 1)] = key;
        pushed = 1;
      }
    }
    if (__syncthreads_or(pushed)) {
      const int found = count;
      __syncthreads();
      if (found > k + kSpare) threshold = best.prune();
    }
  }

  __syncthreads();
  const int found = best.rank();
  Candidate* out = sections.best + blockIdx.x * sections.kept;
  for (int i = threadIdx.x; i < k; i += kThreads) out[i] = i < found ? best.sorted[i] : 0;
}

}  // namespace
}  // namespace condgen_fast::beam_search
