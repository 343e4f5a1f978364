// The team of a GPU, one warp a sentence, and the kernels; apart from their launches, so that tests/cpp can run them on
// a CPU, lane by lane.
#pragma once

#include "beam_hypotheses.h"
#include "beam_update.h"

namespace condgen_fast::beam_search {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Warp {
  static constexpr int width = 32;
  int lane;

  static __device__ void sync() { __syncwarp(); }
  static __device__ unsigned ballot(bool value) { return __ballot_sync(kAllLanes, value); }
  static __device__ int first(unsigned mask) { return __ffs(static_cast<int>(mask)) - 1; }
  __device__ int before(unsigned mask) const { return __popc(mask & ((1u << lane) - 1)); }
  static __device__ int count(unsigned mask) { return __popc(mask); }
  __device__ float max(float value) const {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      const unsigned bits = __shfl_sync(kAllLanes, __builtin_bit_cast(unsigned, value), lane ^ distance);
      const float other = __builtin_bit_cast(float, bits);
      value = other > value ? other : value;
    }
    return value;
  }
  static __device__ void add_one(int64_t* value) { atomicAdd(reinterpret_cast<unsigned long long*>(value), 1ull); }
};

__global__ void __launch_bounds__(Warp::width) beam_update_kernel(Update update) {
  Sentence<Warp>(update, blockIdx.x, Warp{static_cast<int>(threadIdx.x)}).update();
}

__global__ void __launch_bounds__(Warp::width) beam_hypotheses_kernel(Finished finished) {
  const int64_t hypothesis = static_cast<int64_t>(blockIdx.x) * Warp::width + threadIdx.x;
  if (hypothesis < finished.batch * finished.count) trace_back(finished, hypothesis);
}

}  // namespace
}  // namespace condgen_fast::beam_search
