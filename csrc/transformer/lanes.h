// Rows into lanes and back, and the weights' types. Only for *_cpu.cpp files.
#pragma once

#include <utility>

#include "common/simd.h"
#include "transformer.h"

namespace condgen_fast::transformer::CONDGEN_FAST_ISA {
namespace {

using simd::Floats;
using simd::kLanes;
using simd::Vec;

// Not Vec(x): x + 0 is an instruction that x - 0 is not.
inline Vec broadcast(float x) { return Vec(x - Floats{}); }

template <int... kLane>
inline Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return Vec(__builtin_shufflevector(a.raw, b.raw, (kLane % 2 ? int(kLanes) + kLane / 2 : kLane / 2)...));
}
template <int... kLane>
inline Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kLanes / 2;
  return Vec(__builtin_shufflevector(a.raw, b.raw, (kHalf + (kLane % 2 ? int(kLanes) + kLane / 2 : kLane / 2))...));
}

// Lane j of row i becomes lane i of row j. Each round moves the highest bit of the row's number behind the column's
// lowest, and that of the column's behind the row's.
inline void transpose(Vec (&rows)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> kAll{};
#pragma GCC unroll 4
  for (int64_t round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], kAll);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], kAll);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Lane i is the sum of the lanes of rows[i], always added in the same order.
inline Vec sums(Vec (&rows)[kLanes]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i) rows[i] = rows[i] + rows[i + half];
  }
  return rows[0];
}

inline Vec load_up_to(const float* from, int64_t count) {
  return count >= kLanes ? simd::load(from) : simd::load_first(from, count, 0.0f);
}
inline void store_up_to(float* to, Vec lanes, int64_t count) {
  if (count >= kLanes) {
    simd::store(to, lanes);
  } else {
    simd::store_first(to, lanes, count);
  }
}

// call(pointer) with the type that the weights have
template <class Call>
inline void with_weights(const Matrix& matrix, const Call& call) {
  switch (matrix.type) {
    case Real::kFloat:
      return call(static_cast<const float*>(matrix.data));
    case Real::kBFloat16:
      return call(static_cast<const simd::BFloat16*>(matrix.data));
    case Real::kHalf:
      return call(static_cast<const simd::Half*>(matrix.data));
  }
}

// A row of weights as float; nothing beyond `count` is touched
template <class T>
inline void copy_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) simd::store(to + i, simd::load(from + i));
  if (i < count) simd::store_first(to + i, simd::load_first(from + i, count - i, 0.0f), count - i);
}

}  // namespace
}  // namespace condgen_fast::transformer::CONDGEN_FAST_ISA
