// Which tokens of a sentence equal a given one, as words of bits, by comparing all of them: codes of 16 or 32 bits, as
// many at a time as the instruction set has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// Unnamed on purpose: the including file is compiled once per instruction set, and no copy may stand in for another.
namespace {

inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }
inline int64_t popcount(uint64_t word) { return __builtin_popcountll(word); }

// The first `count` bits of the word that starts at bit 64 w, all or none of them where it lies apart.
inline uint64_t low_bits_of_word(int64_t count, int64_t w) { return count <= 64 * w ? 0 : low_bits(count - 64 * w); }

// The words of bits of the tokens of y that equal a given one. Code: uint16_t or int32_t.
#if defined(__AVX512BW__)
inline __m512i broadcast(uint16_t token) { return _mm512_set1_epi16(static_cast<int16_t>(token)); }
inline __m512i broadcast(int32_t token) { return _mm512_set1_epi32(token); }

template <int kTokens>
inline __attribute__((always_inline)) uint64_t match_word(uint16_t, __m512i token, const __m512i* y) {
  const __mmask32 low = _mm512_cmpeq_epi16_mask(token, y[0]);
  if constexpr (kTokens == 32) return _cvtmask32_u32(low);
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_cmpeq_epi16_mask(token, y[1]), low));
}
template <int kTokens>
inline __attribute__((always_inline)) uint64_t match_word(int32_t, __m512i token, const __m512i* y) {
  const __mmask16 first = _mm512_cmpeq_epi32_mask(token, y[0]), second = _mm512_cmpeq_epi32_mask(token, y[1]);
  const __mmask32 low = _mm512_kunpackw(second, first);
  if constexpr (kTokens == 32) return _cvtmask32_u32(low);
  const __mmask16 third = _mm512_cmpeq_epi32_mask(token, y[2]), fourth = _mm512_cmpeq_epi32_mask(token, y[3]);
  return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(fourth, third), low));
}
using Register = __m512i;
#elif defined(__AVX2__)
inline __m256i broadcast(uint16_t token) { return _mm256_set1_epi16(static_cast<int16_t>(token)); }
inline __m256i broadcast(int32_t token) { return _mm256_set1_epi32(token); }

inline uint32_t match_32(uint16_t, __m256i token, const __m256i* y) {  // a pack interleaves halves of 128 bits
  const __m256i packed = _mm256_packs_epi16(_mm256_cmpeq_epi16(token, y[0]), _mm256_cmpeq_epi16(token, y[1]));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(packed, 0xD8)));
}
inline uint32_t match_32(int32_t, __m256i token, const __m256i* y) {
  const __m256i low = _mm256_packs_epi32(_mm256_cmpeq_epi32(token, y[0]), _mm256_cmpeq_epi32(token, y[1]));
  const __m256i high = _mm256_packs_epi32(_mm256_cmpeq_epi32(token, y[2]), _mm256_cmpeq_epi32(token, y[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order)));
}
template <int kTokens, class Code>
inline uint64_t match_word(Code, __m256i token, const __m256i* y) {
  const uint64_t low = match_32(Code{}, token, y);
  if constexpr (kTokens == 32) return low;
  return low | uint64_t{match_32(Code{}, token, y + sizeof(Code))} << 32;
}
using Register = __m256i;
#elif defined(__SSE2__)
inline __m128i broadcast(uint16_t token) { return _mm_set1_epi16(static_cast<int16_t>(token)); }
inline __m128i broadcast(int32_t token) { return _mm_set1_epi32(token); }

inline uint64_t match_16(uint16_t, __m128i token, const __m128i* y) {
  return static_cast<uint32_t>(
      _mm_movemask_epi8(_mm_packs_epi16(_mm_cmpeq_epi16(token, y[0]), _mm_cmpeq_epi16(token, y[1]))));
}
inline uint64_t match_16(int32_t, __m128i token, const __m128i* y) {
  const __m128i low = _mm_packs_epi32(_mm_cmpeq_epi32(token, y[0]), _mm_cmpeq_epi32(token, y[1]));
  const __m128i high = _mm_packs_epi32(_mm_cmpeq_epi32(token, y[2]), _mm_cmpeq_epi32(token, y[3]));
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
}
template <int kTokens, class Code>
inline uint64_t match_word(Code, __m128i token, const __m128i* y) {
  uint64_t match = 0;
  for (int part = 0; part < (kTokens == 32 ? 2 : 4); ++part) {
    match |= match_16(Code{}, token, y + part * static_cast<int>(sizeof(Code))) << (16 * part);
  }
  return match;
}
using Register = __m128i;
#else
template <class Code>
Code broadcast(Code token) {
  return token;
}
template <int kTokens, class Code>
inline uint64_t match_word(Code, Code token, const Code* y) {
  uint64_t match = 0;
  for (int j = 0; j < (kTokens == 32 ? 32 : 64); ++j) match |= uint64_t{token == y[j]} << j;
  return match;
}
#endif

// rows[(i * words + w) * kStride] becomes the word of y's tokens [64 w, 64 w + 64) that equal x[i].
template <int kTokens, int kStride, class Code>
inline void match_rows(const Code* x, int64_t m, const Code* y, uint64_t* rows) {
  constexpr int kWords = (kTokens + 63) / 64;
#if defined(__SSE2__)
  constexpr int kRegisters = kTokens * sizeof(Code) / sizeof(Register), kOfWord = kRegisters / kWords;
  Register tokens[kRegisters];
  std::memcpy(tokens, y, sizeof(tokens));
#else
  constexpr int kOfWord = 64;
  const Code* tokens = y;
#endif
  for (int64_t i = 0; i < m; ++i, rows += kWords * kStride) {
    const auto token = broadcast(x[i]);
    for (int w = 0; w < kWords; ++w) rows[w * kStride] = match_word<kTokens>(Code{}, token, tokens + kOfWord * w);
  }
}

// Copies a row in fewer bits; false if an id does not fit.
template <class Id, class Code>
inline bool narrow(const Id* row, int64_t width, Code* out) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(Id) == 8) {
    __m512i changed = _mm512_setzero_si512();
    for (int64_t i = 0; i < width; i += 8) {
      const __mmask8 there = static_cast<__mmask8>(low_bits(width - i));
      const __m512i ids = _mm512_maskz_loadu_epi64(there, row + i);
      __m512i back;
      if constexpr (sizeof(Code) == 2) {
        const __m128i low = _mm512_maskz_cvtepi64_epi16(there, ids);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), low);
        back = _mm512_maskz_cvtepu16_epi64(there, low);
      } else {
        const __m256i low = _mm512_maskz_cvtepi64_epi32(there, ids);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), low);
        back = _mm512_maskz_cvtepi32_epi64(there, low);
      }
      changed = _mm512_or_si512(changed, _mm512_xor_si512(ids, back));
    }
    return _mm512_test_epi64_mask(changed, changed) == 0;
  }
#endif
  Id changed = 0;
  for (int64_t i = 0; i < width; ++i) {
    out[i] = static_cast<Code>(row[i]);
    changed |= row[i] ^ static_cast<Id>(out[i]);
  }
  return changed == 0;
}

}  // namespace
