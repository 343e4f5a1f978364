// What the CUDA kernels share: one warp a sentence, one 32-bit word of the target a lane, the carry of bit-parallel
// addition looked ahead by two ballots. The walks back are the CPU's, on lane 0. Kernels stand apart from their
// launches, so that tests/cpp can run them on a CPU, lane by lane.
#pragma once

#include "levenshtein/levenshtein.h"
#include "levenshtein/trace_back.h"

namespace condgen_fast::levenshtein {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

// Tokens before the padding at the end.
template <class Id>
__device__ int64_t warp_length(const Id* row, int64_t width, int64_t pad_id, int lane) {
  for (int64_t base = (width - 1) / kWarp * kWarp; base >= 0 && width > 0; base -= kWarp) {
    const int64_t i = base + lane;
    const unsigned real = __ballot_sync(kAll, i < width && row[i] != pad_id);
    if (real != 0) return base + kWarp - __clz(real);
  }
  return 0;
}

template <class Id>
__device__ int64_t warp_common_prefix(const Id* x, int64_t m, const Id* y, int64_t n, int lane) {
  const int64_t shorter = m < n ? m : n;
  for (int64_t base = 0; base < shorter; base += kWarp) {
    const int64_t i = base + lane;
    const unsigned differ = __ballot_sync(kAll, i >= shorter || x[i] != y[i]);
    if (differ != 0) return base + __ffs(differ) - 1;
  }
  return shorter;
}

// Bit j of lane k: y[32 (first_word + k) + j] is the token.
template <class Id>
__device__ uint32_t warp_match(Id token, const Id* y, int64_t n, int64_t first_word, int64_t words, int lane) {
  uint32_t match = 0;
  const int used = words - first_word < kWarp ? static_cast<int>(words - first_word) : kWarp;
#pragma unroll 4
  for (int k = 0; k < used; ++k) {
    const int64_t j = (first_word + k) * kWarp + lane;
    const unsigned equal = __ballot_sync(kAll, j < n && y[j] == token);
    if (k == lane) match = equal;
  }
  return match;
}

// a + b + carry over the 1024 bits of a warp; carry becomes that out of lane 31.
__device__ uint32_t warp_add(uint32_t a, uint32_t b, uint32_t& carry, int lane) {
  const uint32_t sum = a + b;
  const uint64_t generate = __ballot_sync(kAll, sum < a);
  const uint64_t propagate = __ballot_sync(kAll, sum == ~0u);
  // Adding lets a carry ripple through lanes that propagate; where sum and propagate differ, one arrived.
  const uint64_t arrived = (((generate << 1) | carry) + propagate) ^ propagate;
  carry = static_cast<uint32_t>(arrived >> 32) & 1;
  return sum + (static_cast<uint32_t>(arrived >> lane) & 1);
}

template <class T>
__device__ void warp_fill(T* row, int64_t size, T value, int lane) {
  for (int64_t i = lane; i < size; i += kWarp) row[i] = value;
}

struct TableRows {
  const uint32_t* row;
  int64_t words;
  __device__ const uint32_t* state() const { return row; }
  __device__ void step_back() { row -= words; }
};

}  // namespace
}  // namespace condgen_fast::levenshtein
