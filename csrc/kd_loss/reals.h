// What the kernel says about a vector of floats (common/simd.h), said about one float or one double as well: the end of
// a row that fills no vector, and float64. Its text is then the same for all three.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/simd.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {

using simd::Vec;

template <class V>
constexpr int64_t lanes = 1;
template <>
inline constexpr int64_t lanes<Vec> = simd::kLanes;

template <class V, class T>
inline V load(const T* from) {
  if constexpr (lanes<V> > 1) {
    return simd::load(from);
  } else if constexpr (std::is_same_v<T, double>) {
    return *from;
  } else {
    return simd::to_float(*from);
  }
}

inline void store(double* to, double x) { *to = x; }
template <class T>
inline void store(T* to, float x) {
  *to = simd::from_float<T>(x);
}

// simd.h's functions of a Vec are found by its argument.
inline float exp(float x) { return std::exp(x); }
inline double exp(double x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline double log(double x) { return std::log(x); }
inline float select(bool where, float yes, float no) { return where ? yes : no; }
inline double select(bool where, double yes, double no) { return where ? yes : no; }
inline float max(float a, float b) { return a > b ? a : b; }
inline double max(double a, double b) { return a > b ? a : b; }
inline double reduce_sum(double x) { return x; }
inline float reduce_max(float x) { return x; }
inline double reduce_max(double x) { return x; }

// ln x of normal x > 0 within 1 ulp, NaN of NaN; x = m * 2^n with m in [sqrt(1/2), sqrt(2)), ln m by the polynomial of
// Cephes' logf (S. Moshier).
inline Vec log(Vec x) {
  using simd::fma;
  const simd::Ints word = reinterpret_cast<simd::Ints>(x.raw);
  const simd::Ints n = (word - 0x3f3504f3) >> 23;
  const Vec e = __builtin_convertvector(n, simd::Floats);
  const Vec r = Vec(reinterpret_cast<simd::Floats>(word - (n << 23))) - Vec(1.0f);
  const Vec square = r * r;
  Vec p(7.0376836292e-2f);
  p = fma(p, r, Vec(-1.1514610310e-1f));
  p = fma(p, r, Vec(1.1676998740e-1f));
  p = fma(p, r, Vec(-1.2420140846e-1f));
  p = fma(p, r, Vec(1.4249322787e-1f));
  p = fma(p, r, Vec(-1.6668057665e-1f));
  p = fma(p, r, Vec(2.0000714765e-1f));
  p = fma(p, r, Vec(-2.4999993993e-1f));
  p = fma(p, r, Vec(3.3333331174e-1f));
  p = fma(e, Vec(-2.12194440e-4f), p * r * square);
  p = fma(square, Vec(-0.5f), p);
  p = fma(e, Vec(0.693359375f), r + p);
  return select(x == x, p, x);
}

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
