// Random numbers that are a function of (seed, row, column) alone; reference.py defines them. Only for *_cpu.cpp files.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/simd.h"

namespace condgen_fast::refinement::CONDGEN_FAST_ISA {

// A 32-bit number in the lower half of each lane; what stands in the upper half does not matter.
typedef uint64_t Longs __attribute__((vector_size(simd::kLanes * 4)));
typedef uint32_t LowerHalves __attribute__((vector_size(simd::kLanes * 2)));
constexpr int64_t kLongs = simd::kLanes / 2;

inline Longs product(Longs a, uint32_t b) {
  const Longs all = Longs{} + b;
#if defined(__AVX512F__)
  return reinterpret_cast<Longs>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(all)));
#elif defined(__AVX2__)
  return reinterpret_cast<Longs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(all)));
#elif defined(__SSE2__)
  return reinterpret_cast<Longs>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(all)));
#else
  return (a & 0xffffffffu) * all;
#endif
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3) of columns
// 4 * first ... of a row: words[i * count + j] is that of column 4 * (first + j) + i. count is a multiple of kLongs.
inline void random_words(uint64_t seed, uint64_t row, uint64_t first, int64_t count, uint32_t* words) {
  Longs steps;
  for (int64_t lane = 0; lane < kLongs; ++lane) steps[lane] = static_cast<uint64_t>(lane);
  for (int64_t j = 0; j < count; j += kLongs) {
    const Longs quads = steps + (first + static_cast<uint64_t>(j));
    Longs c0 = quads, c1 = quads >> 32, c2 = Longs{} + row, c3 = Longs{} + (row >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Longs product0 = product(c0, 0xD2511F53u), product1 = product(c2, 0xCD9E8D57u);
      c0 = product1 >> 32 ^ c1 ^ uint64_t{k0};
      c2 = product0 >> 32 ^ c3 ^ uint64_t{k1};
      c1 = product1;
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    int64_t kind = 0;
    for (const Longs& c : {c0, c1, c2, c3}) {
      const LowerHalves narrow = __builtin_convertvector(c, LowerHalves);
      std::memcpy(words + kind++ * count + j, &narrow, sizeof narrow);
    }
  }
}

inline double gumbel(uint32_t word) {
  const double fine = (word + 0.5) * 0x1p-32, coarse = ((word >> 9) + 0.5) * 0x1p-23;
  return -std::log(word < (1u << 20) ? fine + fine * fine / 2 : -std::log(1 - coarse));
}

// -log(E) <= -log(w), and the leading zeros of the word bound w from below; the rest is for words that drop their last
// nine bits.
inline double gumbel_at_most(uint32_t word) {
  constexpr double kLogOfTwo = 0.69314718055994531;
  return kLogOfTwo * (std::countl_zero(word) + 1) + 1e-3;
}

// No word from here on has noise above `least`; kAllWords where every word might.
constexpr uint64_t kAllWords = uint64_t{1} << 32;

inline uint64_t words_that_exceed(double least) {
  constexpr double kSlack = 1024;  // two steps of the coarse words
  const double words = -std::expm1(-std::exp(-least)) * 0x1p32 + kSlack;
  return words < 0x1p32 ? static_cast<uint64_t>(words) : kAllWords;
}

}  // namespace condgen_fast::refinement::CONDGEN_FAST_ISA
