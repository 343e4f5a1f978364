// A vector of float32 lanes, as many as the instruction set being compiled for has: 4, 8 or 16. Only for *_cpu.cpp
// files.
//
//   float row_sum_of_exp(const float* x, int64_t n, float shift) {
//     simd::Vec sum(0.0f);
//     int64_t i = 0;
//     for (; i + simd::kLanes <= n; i += simd::kLanes) sum = sum + exp(simd::load(x + i) - simd::Vec(shift));
//     if (i < n) sum = sum + exp(simd::load_first(x + i, n - i, -INFINITY) - simd::Vec(shift));
//     return reduce_sum(sum);
//   }
//
// load and store take float, Half and BFloat16, so a kernel is a template on the type in memory. The vectors are the
// compiler's own (GCC and Clang vector extensions); intrinsics stand where these have no word for what is meant.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace condgen_fast::simd {

// Sixteen-bit floats as they lie in memory
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline namespace CONDGEN_FAST_ISA {

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fff)
                                                                             << 13;
  // 2^112 moves the exponent's bias from 15 to 127 and makes subnormal numbers normal
  const uint32_t bits =
      rest >= 0x0f800000 ? rest | 0x7f800000 : std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f);
  return std::bit_cast<float>(bits | sign);
#endif
}

// Conversions to memory's type round to nearest, ties to even.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more round to infinity
  if (size < 0x38800000) {  // subnormal: the spacing of floats in [0.5, 1) is that of subnormal halves, 2^-24
    const uint32_t shifted = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13)};
}

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns about the unmasked forms of some intrinsics
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));

struct Vec {
  Floats raw;

  Vec() = default;
  explicit Vec(float all) : raw(Floats{} + all) {}
  Vec(Floats lanes) : raw(lanes) {}

  float operator[](int64_t lane) const { return raw[lane]; }
  friend Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
};

// True or false in each lane: what comparisons give
struct Mask {
  Ints raw;  // -1 or 0

  friend Mask operator&(Mask a, Mask b) { return {a.raw & b.raw}; }
  friend Mask operator|(Mask a, Mask b) { return {a.raw | b.raw}; }
  friend Mask operator~(Mask a) { return {~a.raw}; }
};

inline Mask operator<(Vec a, Vec b) { return {a.raw < b.raw}; }
inline Mask operator>(Vec a, Vec b) { return {a.raw > b.raw}; }
inline Mask operator<=(Vec a, Vec b) { return {a.raw <= b.raw}; }
inline Mask operator>=(Vec a, Vec b) { return {a.raw >= b.raw}; }
inline Mask operator==(Vec a, Vec b) { return {a.raw == b.raw}; }

inline Vec select(Mask where, Vec yes, Vec no) { return where.raw ? yes.raw : no.raw; }

// Of a NaN and a number the second argument is taken: max(new_value, running) never lets a NaN in.
// Of the ternary form, where one comparison serves both, GCC 12 makes a mask and blends: slower, and ports are few.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(kAll, a.raw, b.raw);
#elif defined(__AVX2__)
  return _mm256_max_ps(a.raw, b.raw);
#else
  return a.raw > b.raw ? a.raw : b.raw;
#endif
}
inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(kAll, a.raw, b.raw);
#elif defined(__AVX2__)
  return _mm256_min_ps(a.raw, b.raw);
#else
  return a.raw < b.raw ? a.raw : b.raw;
#endif
}

// Bit i is lane i.
inline uint32_t bits(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask.raw));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask.raw)));
#else
  uint32_t found = 0;
  for (int64_t i = 0; i < kLanes; ++i) found |= (mask.raw[i] & 1u) << i;
  return found;
#endif
}
inline bool any(Mask mask) { return bits(mask) != 0; }

// a * b + c, rounded once where the instruction set has that
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a.raw, b.raw, c.raw);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a.raw, b.raw, c.raw);
#else
  return a.raw * b.raw + c.raw;
#endif
}

// --- Memory
// -----------------------------------------------------------------------------------------------------------

inline Vec load(const float* from) {
  Floats lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Vec load(const BFloat16* from) {
  Shorts narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  return reinterpret_cast<Floats>(__builtin_convertvector(narrow, Words) << 16);
}

// The even ones of twice as many, and the odd ones: less work than one after the other.
inline void load_alternate(const BFloat16* from, Vec& even, Vec& odd) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  even = reinterpret_cast<Floats>(pairs << 16);
  odd = reinterpret_cast<Floats>(pairs & 0xffff0000u);
}

inline Vec load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vec lanes;
  for (int64_t i = 0; i < kLanes; ++i) lanes.raw[i] = to_float(from[i]);
  return lanes;
#endif
}

inline void store(float* to, Vec lanes) { std::memcpy(to, &lanes.raw, sizeof lanes.raw); }

// The high half of each word is what lanes are in 16 bits.
inline Words rounded_to_bfloat16(Vec lanes) {
  const Words bits = reinterpret_cast<Words>(lanes.raw), half = 0x7fff + (bits >> 16 & 1);
#if defined(__AVX512F__)
  const __mmask16 number = _mm512_cmp_ps_mask(lanes.raw, lanes.raw, _CMP_ORD_Q);
  return reinterpret_cast<Words>(_mm512_mask_add_epi32(reinterpret_cast<__m512i>(bits | 0x400000), number,
                                                       reinterpret_cast<__m512i>(bits),
                                                       reinterpret_cast<__m512i>(half)));
#else
  return lanes.raw == lanes.raw ? bits + half : bits | 0x400000;
#endif
}

inline void store(BFloat16* to, Vec lanes) {
  const Shorts narrow = __builtin_convertvector(rounded_to_bfloat16(lanes) >> 16, Shorts);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Half* to, Vec lanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_maskz_cvtps_ph(kAll, lanes.raw, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(lanes.raw, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int64_t i = 0; i < kLanes; ++i) to[i] = from_float<Half>(lanes.raw[i]);
#endif
}

// Two vectors, one after the other
template <class T>
inline void store_two(T* to, Vec first, Vec second) {
  store(to, first);
  store(to + kLanes, second);
}

#if defined(__AVX512F__)
template <>
inline void store_two<BFloat16>(BFloat16* to, Vec first, Vec second) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves a = reinterpret_cast<Halves>(rounded_to_bfloat16(first));
  const Halves b = reinterpret_cast<Halves>(rounded_to_bfloat16(second));
  const Halves high = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33, 35,
                                              37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
  std::memcpy(to, &high, sizeof high);
}
#endif

// The first `count` lanes, 0 <= count <= kLanes, from memory and `fill` in the others; nothing beyond is touched.
template <class T>
inline Vec load_first(const T* from, int64_t count, float fill) {
  T some[kLanes];
  const T filler = from_float<T>(fill);
  for (int64_t i = 0; i < kLanes; ++i) some[i] = i < count ? from[i] : filler;
  return load(some);
}

template <class T>
inline void store_first(T* to, Vec lanes, int64_t count) {
  T some[kLanes];
  store(some, lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

#if defined(__AVX512F__)
template <>
inline Vec load_first<float>(const float* from, int64_t count, float fill) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1), from);
}
template <>
inline void store_first<float>(float* to, Vec lanes, int64_t count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), lanes.raw);
}
#endif

// Copies bytes past the caches, which neither keep them nor read the lines that are overwritten: for results of many
// megabytes. finish_streams() comes before another thread may read them.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  using Line = __m512i;
  constexpr auto write = [](void* at, Line line) { _mm512_stream_si512(static_cast<Line*>(at), line); };
#elif defined(__AVX2__)
  using Line = __m256i;
  constexpr auto write = [](void* at, Line line) { _mm256_stream_si256(static_cast<Line*>(at), line); };
#else
  using Line = __m128i;
  constexpr auto write = [](void* at, Line line) { _mm_stream_si128(static_cast<Line*>(at), line); };
#endif
  constexpr int64_t kSize = sizeof(Line);
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const int64_t head = (kSize - reinterpret_cast<uintptr_t>(to) % kSize) % kSize;
  if (bytes >= head + kSize) {
    std::memcpy(target, source, head);
    int64_t done = head;
    for (; done + kSize <= bytes; done += kSize) {
      Line line;
      std::memcpy(&line, source + done, sizeof line);
      write(target + done, line);
    }
    std::memcpy(target + done, source + done, bytes - done);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- Within a vector
// --------------------------------------------------------------------------------------------------

// Both pair lane i with lane i + half, of halves until one lane is left.
#if defined(__AVX2__)
template <class Pair>
inline float reduce(Vec lanes, const Pair& pair) {
#if defined(__AVX512F__)
  const __m256 half = pair(__builtin_shufflevector(lanes.raw, lanes.raw, 0, 1, 2, 3, 4, 5, 6, 7),
                           __builtin_shufflevector(lanes.raw, lanes.raw, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const __m256 half = lanes.raw;
#endif
  const __m128 four = pair(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 two = pair(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(pair(two, _mm_movehdup_ps(two)));
}
#else
template <class Pair>
inline float reduce(Vec lanes, const Pair& pair) {
  return pair(pair(lanes.raw[0], lanes.raw[2]), pair(lanes.raw[1], lanes.raw[3]));
}
#endif
inline float reduce_sum(Vec lanes) {
  return reduce(lanes, [](auto a, auto b) { return a + b; });
}
inline float reduce_max(Vec lanes) {
  return reduce(lanes, [](auto a, auto b) { return a > b ? a : b; });
}

// --- Functions
// --------------------------------------------------------------------------------------------------------

// e^x within 1 ulp (1.2 without fma): 0 for -inf, inf from 88.73 on, NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2,
// e^r by a minimax polynomial. AVX-512 has subnormal results too; elsewhere those below 2^-126.5 are 0 and those from
// 2^127.5 on are inf.
inline Vec exp(Vec x) {
  const Vec log2_e(1.44269504088896341f);
#if defined(__AVX512F__)
  x = min(Vec(89.0f), max(Vec(-104.0f), x));  // beyond these e^x is 0 and infinity; NaN passes unchanged
  const Vec n = _mm512_maskz_roundscale_ps(kAll, (x * log2_e).raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = min(Vec(89.0f), max(Vec(-88.0f), x));
  const Vec shift(0x1.8p23f + 127.0f);  // adding it rounds to an integer; with the bias it is then in the low bits
  const Vec shifted = fma(x, log2_e, shift);
  const Vec n = shifted - shift;
#endif
  Vec r = fma(n, Vec(-0.693359375f), x);  // n times this has no rounding error
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p(1.381459879e-3f);
  p = fma(p, r, Vec(8.368716575e-3f));
  p = fma(p, r, Vec(4.166838899e-2f));
  p = fma(p, r, Vec(1.666652113e-1f));
  p = fma(p, r, Vec(4.999999404e-1f));
  p = fma(p, r, Vec(1.0f));
  p = fma(p, r, Vec(1.0f));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(kAll, p.raw, n.raw);
#else
  return p * Vec(reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted.raw) << 23));
#endif
}

// 2^x within 1 ulp, with the limits of exp(). A softmax whose logits are multiplied by log2 e saves a reduction with
// it.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec r = _mm512_maskz_reduce_ps(kAll, x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // x - n
  const Vec n = x - r;
#else
  x = min(Vec(128.0f), max(Vec(-127.0f), x));
  const Vec shift(0x1.8p23f + 127.0f), shifted = x + shift;
  const Vec r = x - (shifted - shift);
#endif
  Vec p(1.535334159e-4f);
  p = fma(p, r, Vec(1.339890063e-3f));
  p = fma(p, r, Vec(9.618437849e-3f));
  p = fma(p, r, Vec(5.550332367e-2f));
  p = fma(p, r, Vec(2.402264774e-1f));
  p = fma(p, r, Vec(6.931471825e-1f));
  p = fma(p, r, Vec(1.0f));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(kAll, p.raw, n.raw);
#else
  return p * Vec(reinterpret_cast<Floats>(reinterpret_cast<Ints>(shifted.raw) << 23));
#endif
}

// 2^x of x <= 128 for what is rounded to 16 bits in the end: within 1.5e-7 of it; 2^n is exact. As 2^floor(x) * 2^r,
// for which AVX-512 has instructions; elsewhere exp2().
inline Vec short_exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec r = _mm512_maskz_reduce_ps(kAll, x.raw, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // in [0, 1]
  Vec p(1.867129817e-3f);
  p = fma(p, r, Vec(9.017030708e-3f));
  p = fma(p, r, Vec(5.579991266e-2f));
  p = fma(p, r, Vec(2.401644439e-1f));
  p = fma(p, r, Vec(6.931512952e-1f));
  p = fma(p, r, Vec(1.0f));
  return _mm512_maskz_scalef_ps(kAll, p.raw, x.raw);  // which rounds x down
#else
  return exp2(x);
#endif
}

}  // namespace CONDGEN_FAST_ISA
}  // namespace condgen_fast::simd
