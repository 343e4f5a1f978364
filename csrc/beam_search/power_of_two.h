// Sums of powers of two: fewer instructions than simd::exp needs, as the powers are only ever added up. Only for
// *_cpu.cpp files.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/simd.h"

namespace condgen_fast::beam_search::CONDGEN_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kFractionBits = 5;  // a table of 2^0, 2^(1/32), ... 2^(31/32) fills two registers
#elif defined(__AVX2__)
constexpr int kFractionBits = 3;
#else
constexpr int kFractionBits = 0;
#endif
constexpr int kFractions = 1 << kFractionBits;

// 2^(x * scale - shift) for `shift` near logit * scale.
//
// With n the integer nearest to (x * scale - shift) * kFractions and r the rest, the power is the table's entry for n's
// lower bits, times 2 to the power of its upper bits, times a short polynomial of r: relative error 2.5e-7 (on average
// 2e-8), but that scale is a rounded number. An exponent below -125 counts as that, and so does NaN's; above 115
// nothing is right.
//
// What is added up is the power divided by `unit`: 1, but where e^y = ((1 + y)^2 + 1) / 2, good enough for y as short
// as |r| ln 2 / 32, makes the polynomial a single multiply-add of r + kCentre, which is no more work to compute than r.
class PowerOfTwo {
 public:
  static constexpr double unit = kFractionBits == 5 ? 0x1.edc589p-13 : 1.0;

  // kFused: shift is an integer, which lets fused multiply-adds save two instructions of twelve; only where `can_fuse`.
  static bool can_fuse(float logit, float scale) {
#if defined(__AVX2__)
    return std::abs(logit * scale) < 0x1p16f && scale < 0x1p100f;
#else
    return false && logit < scale;
#endif
  }

  static PowerOfTwo fused(float logit, float scale) {
    const float shift = std::nearbyint(logit * scale);
    PowerOfTwo power(scale, shift);
    power.least_ = simd::Vec(std::max((shift - 125.0f) / scale, std::numeric_limits<float>::lowest()));
    power.origin_ = simd::Vec(kMagic - shift * kFractions);
    power.centre_ = simd::Vec(kMagic - shift * kFractions + kCentre);
    return power;
  }

  static PowerOfTwo plain(float logit, float scale) {
    PowerOfTwo power(scale, static_cast<double>(logit) * scale);
    power.origin_ = simd::Vec(logit);
    power.least_ = simd::Vec(-125.0f * kFractions);
    return power;
  }

  double shift() const { return shift_; }

  // sum + 2^(x * scale - shift) / unit
  template <bool kFused>
  simd::Vec add(simd::Vec x, simd::Vec sum) const {
    using simd::Vec, simd::Words;
    Vec shifted, r;  // r is r + kCentre from here on
    if constexpr (kFused) {
      x = max(x, least_);
      shifted = fma(x, scale_, origin_);
      r = fma(x, scale_, (kCentre == 0.0f ? origin_ : centre_) - shifted);
    } else {
      const Vec y = max((x - origin_) * scale_, least_);
      shifted = y + Vec(kMagic);
      r = y - (shifted - Vec(kMagic + kCentre));
    }
    const Words n = reinterpret_cast<Words>(shifted.raw);
    const Vec power = reinterpret_cast<simd::Floats>(reinterpret_cast<Words>(entry(n).raw) + (n << kShift));
    return fma(power, polynomial(r), sum);
  }

 private:
  static constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer, which is then in the low bits
  static constexpr float kCentre = kFractionBits == 5 ? 46.0f : 0.0f;  // near 32 / ln 2
  static constexpr int kShift = 23 - kFractionBits;

  // 2^(j / kFractions), less what n's lower bits j will add when n is shifted to the place of the exponent
  static constexpr std::array<float, kFractions> kEntries = [] {
    constexpr double kRoots[] = {2,
                                 1.4142135623730951,
                                 1.189207115002721,
                                 1.0905077326652577,
                                 1.0442737824274138,
                                 1.0218971486541166};  // 2^(1/1), 2^(1/2), 2^(1/4), ...
    std::array<float, kFractions> entries{};
    double power = 1;
    for (int j = 0; j < kFractions; ++j, power *= kRoots[kFractionBits]) {
      const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(power));
      entries[j] = std::bit_cast<float>(bits - (static_cast<uint32_t>(j) << kShift));
    }
    return entries;
  }();

  double shift_;
  simd::Vec scale_, least_, origin_, centre_, low_, high_;

  PowerOfTwo(float scale, double shift)
      : shift_(shift), scale_(std::min(scale * kFractions, std::numeric_limits<float>::max())) {
#if defined(__AVX512F__)
    low_ = simd::load(kEntries.data());
    high_ = simd::load(kEntries.data() + 16);
#elif defined(__AVX2__)
    low_ = simd::load(kEntries.data());
#else
    low_ = simd::Vec(kEntries[0]);
#endif
  }

  simd::Vec entry([[maybe_unused]] simd::Words n) const {
#if defined(__AVX512F__)
    return _mm512_permutex2var_ps(low_.raw, reinterpret_cast<__m512i>(n), high_.raw);
#elif defined(__AVX2__)
    return _mm256_permutevar8x32_ps(low_.raw, reinterpret_cast<__m256i>(n));
#else
    return low_;
#endif
  }

  // 2^(r / kFractions) / unit for r in [-0.5, 0.5], of r + kCentre
  static simd::Vec polynomial(simd::Vec r) {
    using simd::Vec;
    constexpr double u = 0.69314718055994531 / kFractions;
    if constexpr (kFractionBits == 5) {
      return fma(r, r, Vec(2131.21021f));  // minimax, with unit: 1.3e-7
    } else if constexpr (kFractionBits == 3) {
      // r^4 is near r^2 / 4
      Vec p(static_cast<float>(u * u * u / 6));
      p = fma(p, r, Vec(static_cast<float>(u * u / 2 + u * u * u * u / 96)));
      p = fma(p, r, Vec(static_cast<float>(u)));
      return fma(p, r, Vec(1.0f));
    } else {
      Vec p(0.00132647261f);  // minimax
      p = fma(p, r, Vec(0.00967151299f));
      p = fma(p, r, Vec(0.0555073358f));
      p = fma(p, r, Vec(0.240222424f));
      p = fma(p, r, Vec(0.693147004f));
      return fma(p, r, Vec(1.0f));
    }
  }
};

}  // namespace condgen_fast::beam_search::CONDGEN_FAST_ISA
