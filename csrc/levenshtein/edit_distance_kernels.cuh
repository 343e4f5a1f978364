// Edit distance and unit-cost alignment.
#pragma once

#include "levenshtein/warp.cuh"

namespace condgen_fast::levenshtein {
namespace {

// One row of unit-cost distance by Myers and Hyyrö; their letters (bit_parallel.h). Reads vp and vn, writes vp, vn_out,
// which may be vn, and d0_out unless it is null. Returns the change of the distance in the lane that holds y's last
// token, else 0.
template <class Id>
__device__ int warp_unit_cost_row(Id token, const Id* y, int64_t n, uint32_t* vp, const uint32_t* vn, uint32_t* vn_out,
                                  uint32_t* d0_out, int lane) {
  const int64_t words = (n + kWarp - 1) / kWarp;
  uint32_t carry = 0, hp_in = 1, hn_in = 0;
  int change = 0;
  for (int64_t first = 0; first < words; first += kWarp) {
    const int64_t word = first + lane;
    const uint32_t match = warp_match(token, y, n, first, words, lane);
    const uint32_t p = word < words ? vp[word] : ~0u;
    const uint32_t q = word < words ? vn[word] : 0u;
    const uint32_t d0 = (warp_add(match & p, p, carry, lane) ^ p) | match | q;
    const uint32_t hp = q | ~(d0 | p);
    const uint32_t hn = d0 & p;
    if (word == words - 1) {
      const int last_bit = static_cast<int>((n - 1) % kWarp);
      change = static_cast<int>((hp >> last_bit) & 1) - static_cast<int>((hn >> last_bit) & 1);
    }
    const uint32_t hp_below = __shfl_up_sync(kAll, hp, 1) >> 31;
    const uint32_t hn_below = __shfl_up_sync(kAll, hn, 1) >> 31;
    const uint32_t hp_shifted = (hp << 1) | (lane == 0 ? hp_in : hp_below);
    const uint32_t hn_shifted = (hn << 1) | (lane == 0 ? hn_in : hn_below);
    hp_in = __shfl_sync(kAll, hp, kWarp - 1) >> 31;
    hn_in = __shfl_sync(kAll, hn, kWarp - 1) >> 31;
    if (word < words) {
      vp[word] = hn_shifted | ~(d0 | hp_shifted);
      vn_out[word] = hp_shifted & d0;
      if (d0_out != nullptr) d0_out[word] = d0;
    }
  }
  return change;
}

// scratch: 2 ceil(T / 32) words for each sentence, or null where shared memory has them.
template <class Id>
__global__ void __launch_bounds__(kWarp)
    edit_distance_kernel(DistanceArguments<Id> arguments, uint32_t* scratch, int64_t scratch_words) {
  extern __shared__ uint32_t shared[];
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const Id* x = arguments.first_row(b);
  const Id* y = arguments.second_row(b);
  int64_t m = warp_length(x, arguments.width, arguments.pad_id, lane);
  int64_t n = warp_length(y, arguments.other_width, arguments.pad_id, lane);
  const int64_t offset = warp_common_prefix(x, m, y, n, lane);
  x += offset, y += offset, m -= offset, n -= offset;
  const int64_t words = (n + kWarp - 1) / kWarp;
  uint32_t* vp = scratch == nullptr ? shared : scratch + b * scratch_words;  // or V of the LCS
  uint32_t* vn = vp + words;
  warp_fill(vp, words, ~0u, lane);
  warp_fill(vn, words, 0u, lane);
  int change = 0;  // of the distance, where the last token of y lies
  for (int64_t i = 0; i < m; ++i) {
    if (arguments.substitution) {
      change += warp_unit_cost_row(x[i], y, n, vp, vn, vn, nullptr, lane);
      continue;
    }
    uint32_t carry = 0;
    for (int64_t first = 0; first < words; first += kWarp) {
      const int64_t word = first + lane;
      const uint32_t match = warp_match(x[i], y, n, first, words, lane);
      const uint32_t value = word < words ? vp[word] : ~0u;
      const uint32_t next = warp_add(value, value & match, carry, lane) | (value & ~match);
      if (word < words) vp[word] = next;
    }
  }
  if (!arguments.substitution) {
    for (int64_t word = lane; word < words; word += kWarp) change -= 2 * __popc(~vp[word]);
  }
  change = __reduce_add_sync(kAll, change);
  if (lane != 0) return;
  if (n == 0) {
    arguments.distance[b] = m;
  } else {
    arguments.distance[b] = (arguments.substitution ? n : m + n) + change;
  }
}

// Words of 32 bits that a sentence needs: VP, and VN and D0 of every row.
CONDGEN_FAST_HOST_DEVICE inline int64_t alignment_words(int64_t width, int64_t other_width) {
  return (2 * width + 2) * ((other_width + kWarp - 1) / kWarp);
}

// scratch: alignment_words() for each sentence, or null where shared memory has them.
template <class Id>
__global__ void __launch_bounds__(kWarp)
    edit_alignment_kernel(AlignmentArguments<Id> arguments, uint32_t* scratch, int64_t scratch_words) {
  extern __shared__ uint32_t shared[];
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const Id* x = arguments.tokens + b * arguments.width;
  const Id* y = arguments.target + b * arguments.other_width;
  const int64_t m = warp_length(x, arguments.width, arguments.pad_id, lane);
  const int64_t n = warp_length(y, arguments.other_width, arguments.pad_id, lane);
  const int64_t words = (n + kWarp - 1) / kWarp;
  uint32_t* vp = scratch == nullptr ? shared : scratch + b * scratch_words;
  uint32_t* vn = vp + words;
  uint32_t* d0 = vn + (m + 1) * words;
  warp_fill(vp, words, ~0u, lane);
  warp_fill(vn, words, 0u, lane);
  int change = 0;
  for (int64_t i = 0; i < m; ++i) {
    change += warp_unit_cost_row(x[i], y, n, vp, vn + i * words, vn + (i + 1) * words, d0 + i * words, lane);
  }
  change = __reduce_add_sync(kAll, change);

  const int64_t out_width = arguments.width + arguments.other_width;
  Id* out_x = arguments.aligned_tokens + b * out_width;
  Id* out_y = arguments.aligned_target + b * out_width;
  int64_t steps = 0;
  __syncwarp();
  if (lane == 0) {
    TableRows d0_rows{d0 + (m - 1) * words, words}, vn_rows{vn + (m - 1) * words, words};
    steps = trace_alignment(d0_rows, vn_rows, x, m, y, n, static_cast<Id>(arguments.gap_id), out_x + out_width,
                            out_y + out_width);
    arguments.lengths[b] = steps;
    arguments.distance[b] = n == 0 ? m : n + change;
  }
  steps = __shfl_sync(kAll, steps, 0);
  __syncwarp();
  const int64_t shift = out_width - steps;
  for (int64_t base = 0; base < out_width; base += kWarp) {  // to the left: read before anything there is overwritten
    const int64_t k = base + lane;
    const Id first = k < steps ? out_x[k + shift] : static_cast<Id>(arguments.pad_id);
    const Id second = k < steps ? out_y[k + shift] : static_cast<Id>(arguments.pad_id);
    __syncwarp();
    if (k < out_width) out_x[k] = first, out_y[k] = second;
    __syncwarp();
  }
}

}  // namespace
}  // namespace condgen_fast::levenshtein
