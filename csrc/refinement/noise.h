// Random numbers that are a function of (seed, row, chunk) alone; reference.py defines them.
#pragma once

#include <cmath>
#include <cstdint>

namespace condgen_fast::refinement {

// Columns that share their random numbers.
constexpr int64_t kChunk = 2048;

struct ChunkNoise {
  double exponential;  // standard exponential: -log(exponential) is standard Gumbel
  double uniform;      // in (0, 1), a multiple of 2^-54
};

// Of one block of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).
inline ChunkNoise chunk_noise(uint64_t seed, uint64_t row, uint64_t chunk) {
  uint32_t c0 = static_cast<uint32_t>(chunk), c1 = static_cast<uint32_t>(chunk >> 32);
  uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // All bits of a small word count, as small exponentials decide; elsewhere 23, so that 1 - w is exact in float32.
  const double fine = (c0 + 0.5) * 0x1p-32, coarse = ((c0 >> 9) + 0.5) * 0x1p-23;
  const double exponential = c0 < (1u << 20) ? fine + fine * fine / 2 : -std::log1p(-coarse);
  return {exponential, (static_cast<double>(uint64_t{c1} << 21 | c2 >> 11) + 0.5) * 0x1p-53};
}

}  // namespace condgen_fast::refinement
