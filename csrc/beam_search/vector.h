// The widest vector of floats of the instruction set this file is compiled for, with the few operations of the scan.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
// GCC 12 takes its own _mm512_undefined_ps() for a mistake
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "beam_search.h"

namespace condgen_fast::beam_search::CONDGEN_FAST_ISA {

// 2 ** f for f in [-0.5, 0.5]: 1 + f * kPower[0] + ...; relative error 1.6e-7 (minimax of degree 5, in float)
constexpr float kPower[5] = {0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647261f};
constexpr float kLowestPower = -126.0f;  // below it 2 ** x is taken for what it is here, which no sum of 1 or more feels

#if defined(__AVX512F__)

struct Vector {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vector all(float x) { return {_mm512_set1_ps(x)}; }
  static Vector load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Vector load(const Bfloat16* x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vector load(const Float16* x) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
  }
  static Vector load(const double* x) {
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(x)), high = _mm512_cvtpd_ps(_mm512_loadu_pd(x + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  void store(float* x) const { _mm512_storeu_ps(x, v); }
  Vector operator+(Vector other) const { return {_mm512_add_ps(v, other.v)}; }
  Vector operator-(Vector other) const { return {_mm512_sub_ps(v, other.v)}; }
  Vector operator*(Vector other) const { return {_mm512_mul_ps(v, other.v)}; }
  // The greater; `other` where this is NaN.
  Vector max(Vector other) const { return {_mm512_max_ps(v, other.v)}; }
  // Bit i: lane i is greater; never where it is NaN.
  uint32_t above(Vector other) const { return _mm512_cmp_ps_mask(v, other.v, _CMP_GT_OQ); }
  float highest() const { return _mm512_reduce_max_ps(v); }
  float sum() const { return _mm512_reduce_add_ps(v); }

  Vector exp2() const {  // of x <= 0; 0 of NaN
    const __m512 x = _mm512_max_ps(v, _mm512_set1_ps(kLowestPower));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(kPower[4]);
    for (int i = 3; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kPower[i]));
    return {_mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), whole)};
  }
};

#elif defined(__AVX2__)

struct Vector {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vector all(float x) { return {_mm256_set1_ps(x)}; }
  static Vector load(const float* x) { return {_mm256_loadu_ps(x)}; }
  static Vector load(const Bfloat16* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vector load(const Float16* x) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
  }
  static Vector load(const double* x) {
    return {_mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(x + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(x)))};
  }
  void store(float* x) const { _mm256_storeu_ps(x, v); }
  Vector operator+(Vector other) const { return {_mm256_add_ps(v, other.v)}; }
  Vector operator-(Vector other) const { return {_mm256_sub_ps(v, other.v)}; }
  Vector operator*(Vector other) const { return {_mm256_mul_ps(v, other.v)}; }
  Vector max(Vector other) const { return {_mm256_max_ps(v, other.v)}; }
  uint32_t above(Vector other) const { return _mm256_movemask_ps(_mm256_cmp_ps(v, other.v, _CMP_GT_OQ)); }
  float highest() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  Vector exp2() const {
    const __m256 x = _mm256_max_ps(v, _mm256_set1_ps(kLowestPower));
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x, whole);
    __m256 p = _mm256_set1_ps(kPower[4]);
    for (int i = 3; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kPower[i]));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent))};
  }
};

#else

// Loops over lanes that the compiler makes vectors of, where it can.
struct Vector {
  static constexpr int kLanes = 8;
  float v[kLanes];

  static Vector all(float x) {
    Vector out;
    for (float& lane : out.v) lane = x;
    return out;
  }
  static Vector load(const float* x) {
    Vector out;
    std::memcpy(out.v, x, sizeof(out.v));
    return out;
  }
  static Vector load(const double* x) {
    Vector out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = static_cast<float>(x[i]);
    return out;
  }
  static Vector load(const Bfloat16* x) {
    Vector out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = std::bit_cast<float>(uint32_t{x[i].bits} << 16);
    return out;
  }
  static Vector load(const Float16* x) {
    Vector out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = to_float(x[i].bits);
    return out;
  }
  void store(float* x) const { std::memcpy(x, v, sizeof(v)); }
  Vector operator+(Vector other) const {
    for (int i = 0; i < kLanes; ++i) other.v[i] = v[i] + other.v[i];
    return other;
  }
  Vector operator-(Vector other) const {
    for (int i = 0; i < kLanes; ++i) other.v[i] = v[i] - other.v[i];
    return other;
  }
  Vector operator*(Vector other) const {
    for (int i = 0; i < kLanes; ++i) other.v[i] = v[i] * other.v[i];
    return other;
  }
  Vector max(Vector other) const {
    for (int i = 0; i < kLanes; ++i) other.v[i] = v[i] > other.v[i] ? v[i] : other.v[i];
    return other;
  }
  uint32_t above(Vector other) const {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t{v[i] > other.v[i]} << i;
    return bits;
  }
  float highest() const {
    float x = v[0];
    for (int i = 1; i < kLanes; ++i) x = v[i] > x ? v[i] : x;
    return x;
  }
  float sum() const {
    float x = 0.0f;
    for (float lane : v) x += lane;
    return x;
  }

  Vector exp2() const {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves the nearest integer in the low bits
    Vector out;
    for (int i = 0; i < kLanes; ++i) {
      const float x = v[i] > kLowestPower ? v[i] : kLowestPower;
      const float rounded = x + kRound;
      const float f = x - (rounded - kRound);
      float p = kPower[4];
      for (int j = 3; j >= 0; --j) p = p * f + kPower[j];
      const uint32_t exponent = std::bit_cast<uint32_t>(rounded) << 23;
      out.v[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(p * f + 1.0f) + exponent);
    }
    return out;
  }

 private:
  static float to_float(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // moved in place, the exponent is short by 112; the multiplication also makes subnormals normal
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
  }
};

#endif

}  // namespace condgen_fast::beam_search::CONDGEN_FAST_ISA
