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

// The smaller the value the smaller the key; -0 and 0 are one value.
CONDGEN_FAST_HOST_DEVICE uint32_t ordered(float value) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Keys of which the smaller goes first: lowest score, highest confidence, lowest entropy. NaN is no confidence at all.
CONDGEN_FAST_HOST_DEVICE uint32_t lowest_first(float score) { return ordered(score != score ? -INFINITY : score); }

CONDGEN_FAST_HOST_DEVICE uint32_t highest_first(float confidence) { return ~lowest_first(confidence); }

CONDGEN_FAST_HOST_DEVICE uint32_t surest_first(float entropy) {
  return ordered(entropy != entropy ? INFINITY : entropy);
}

CONDGEN_FAST_HOST_DEVICE bool reaches(float confidence, float bound) {
  return (confidence != confidence ? -INFINITY : confidence) >= bound;
}

CONDGEN_FAST_HOST_DEVICE int64_t entropy_units(float entropy) {
  const float clamped = entropy > 0.0f ? (entropy < kLargestEntropy ? entropy : kLargestEntropy) : 0.0f;
  return static_cast<int64_t>(rint((entropy != entropy ? kLargestEntropy : clamped) / kEntropyUnit));
}

CONDGEN_FAST_HOST_DEVICE bool fits(int64_t units, float bound) {
  return static_cast<double>(units) * kEntropyUnit <= static_cast<double>(bound);
}

}  // namespace condgen_fast::refinement
