// What decides which positions of a row go first: the same integers on CPU and GPU, so that both choose alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CONDGEN_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CONDGEN_FAST_HOST_DEVICE inline
#endif

namespace condgen_fast::refinement {

constexpr double kEntropyUnit = 0x1p-32;  // nats; sums of integers do not depend on the order of adding
constexpr float kLargestEntropy = 64.0f;  // nats

// Integers alone, for loops that are to be vectorised: a comparison of floats there may be a branch.
constexpr uint32_t kInfinity = 0x7f800000u, kSign = 0x80000000u;

// The smaller the value the smaller the key; -0 and 0 are one value, and NaN is that of the bits `instead`.
CONDGEN_FAST_HOST_DEVICE uint32_t ordered(float value, uint32_t instead) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  bits = (bits & ~kSign) > kInfinity ? instead : bits;
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | kSign);
}

// Keys of which the smaller goes first: lowest score, highest confidence, lowest entropy. NaN is no confidence at all.
CONDGEN_FAST_HOST_DEVICE uint32_t lowest_first(float score) { return ordered(score, kSign | kInfinity); }

CONDGEN_FAST_HOST_DEVICE uint32_t highest_first(float confidence) { return ~lowest_first(confidence); }

CONDGEN_FAST_HOST_DEVICE uint32_t surest_first(float entropy) { return ordered(entropy, kInfinity); }

CONDGEN_FAST_HOST_DEVICE bool reaches(float confidence, float bound) {
  return (confidence != confidence ? -INFINITY : confidence) >= bound;
}

CONDGEN_FAST_HOST_DEVICE int64_t entropy_units(float entropy) {
  const float bounded = entropy < kLargestEntropy ? entropy : kLargestEntropy;  // NaN is the largest
  return static_cast<int64_t>(rint((bounded > 0.0f ? bounded : 0.0f) / kEntropyUnit));
}

CONDGEN_FAST_HOST_DEVICE bool fits(int64_t units, float bound) {
  return static_cast<double>(units) * kEntropyUnit <= static_cast<double>(bound);
}

}  // namespace condgen_fast::refinement
