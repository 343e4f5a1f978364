// What the kernel says about a vector of floats (common/simd.h), said about one double as well, for float64: its text
// is then the same for both. Real is float or double, V the type that a sweep takes steps of.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/simd.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {

using simd::load;
using simd::store;
using simd::Vec;

template <class Real>
using Wide = std::conditional_t<std::is_same_v<Real, float>, Vec, double>;
template <class Real>
constexpr int64_t kStep = std::is_same_v<Real, float> ? simd::kLanes : 1;

template <class Real, class T>
inline Real to_real(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return static_cast<Real>(x);
  } else {
    return simd::to_float(x);
  }
}

template <class T, class Real>
inline T from_real(Real x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return simd::from_float<T>(static_cast<float>(x));
  }
}

// A step from x on
inline double load(const double* x) { return *x; }
inline void store(double* x, double value) { *x = value; }

// simd.h's functions of a Vec are found by its argument.
inline double exp2(double x) { return std::exp2(x); }
inline double short_exp2(double x) { return std::exp2(x); }
inline double log(double x) { return std::log(x); }
inline double fma(double a, double b, double c) { return a * b + c; }
inline double select(bool where, double yes, double no) { return where ? yes : no; }
inline double max(double a, double b) { return a > b ? a : b; }
inline double reduce_sum(double x) { return x; }
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
