// Random numbers that are a function of (seed, row, column) alone; reference.py defines them. Only for *_cpu.cpp files.
#pragma once

#include <cmath>
#include <cstdint>

namespace condgen_fast::refinement::CONDGEN_FAST_ISA {

// One of ten rounds of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)
struct Philox {
  uint32_t c0, c1, c2, c3;

  Philox rounds(uint32_t k0, uint32_t k1) const {
    Philox c = *this;
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c.c0, product1 = uint64_t{0xCD9E8D57u} * c.c2;
      c = {static_cast<uint32_t>(product1 >> 32) ^ c.c1 ^ k0, static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ c.c3 ^ k1, static_cast<uint32_t>(product0)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }
};

// Words of columns 4 * first ... of a row, count of each kind: words[i * count + j] is that of column 4 * (first + j) +
// i.
inline void random_words(uint64_t seed, uint64_t row, uint64_t first, int64_t count, uint32_t* words) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int64_t j = 0; j < count; ++j) {
    const uint64_t quad = first + static_cast<uint64_t>(j);
    const Philox start{static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), static_cast<uint32_t>(row),
                       static_cast<uint32_t>(row >> 32)};
    const Philox random = start.rounds(k0, k1);
    words[j] = random.c0;
    words[count + j] = random.c1;
    words[2 * count + j] = random.c2;
    words[3 * count + j] = random.c3;
  }
}

inline double gumbel(uint32_t word) {
  const double fine = (word + 0.5) * 0x1p-32, coarse = ((word >> 9) + 0.5) * 0x1p-23;
  return -std::log(word < (1u << 20) ? fine + fine * fine / 2 : -std::log(1 - coarse));
}

// No word from here on has noise above `least`; kAllWords where every word might.
constexpr uint64_t kAllWords = uint64_t{1} << 32;

inline uint64_t words_that_exceed(double least) {
  constexpr double kSlack = 1024;  // two steps of the coarse words
  const double words = -std::expm1(-std::exp(-least)) * 0x1p32 + kSlack;
  return words < 0x1p32 ? static_cast<uint64_t>(words) : kAllWords;
}

}  // namespace condgen_fast::refinement::CONDGEN_FAST_ISA
