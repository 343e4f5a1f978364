// The CUDA kernels: one warp a sentence, one 32-bit word of the target a lane, the carry of bit-parallel addition
// looked ahead by two ballots. The walk back is the CPU's, on lane 0. Apart from their launches, so that tests/cpp can
// run them on a CPU, lane by lane.
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

// scratch: (S + 1) * ceil(T / 32) words for each sentence, or null where shared memory has them.
template <class Id>
__global__ void __launch_bounds__(kWarp)
    edit_oracle_kernel(OracleArguments<Id> arguments, uint32_t* scratch, int64_t scratch_words) {
  extern __shared__ uint32_t shared[];
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int64_t width = arguments.width, target_width = arguments.target_width;
  const int64_t slot_width = width > 0 ? width - 1 : 0;
  LabelWriter labels{};
  labels.delete_row = arguments.delete_labels + b * width;
  labels.insert_row = arguments.insert + b * slot_width;
  labels.masked_row = arguments.masked + b * target_width;
  labels.source_slots = arguments.source_slots;
  warp_fill(labels.delete_row, width, false, lane);
  warp_fill(labels.insert_row, slot_width, int64_t{0}, lane);
  warp_fill(labels.masked_row, target_width, false, lane);

  const Id* x = arguments.tokens + b * width;
  const Id* y = arguments.target + b * target_width;
  const int64_t length = warp_length(x, width, arguments.pad_id, lane);
  const int64_t target_length = warp_length(y, target_width, arguments.pad_id, lane);
  const int64_t offset = warp_common_prefix(x, length, y, target_length, lane);
  const int64_t m = length - offset, n = target_length - offset;
  x += offset;
  y += offset;

  const int64_t words = (n + kWarp - 1) / kWarp;
  uint32_t* row = scratch == nullptr ? shared : scratch + b * scratch_words;
  warp_fill(row, words, ~0u, lane);
  for (int64_t i = 0; i < m; ++i, row += words) {
    const Id token = x[i];
    uint32_t carry = 0;
    for (int64_t first = 0; first < words; first += kWarp) {
      const int64_t word = first + lane;
      const uint32_t match = warp_match(token, y, n, first, words, lane);
      const uint32_t value = word < words ? row[word] : ~0u;
      const uint32_t next = warp_add(value, value & match, carry, lane) | (value & ~match);
      if (word < words) row[words + word] = next;
    }
  }
  int common = 0;
  for (int64_t word = lane; word < words; word += kWarp) common += __popc(~row[word]);
  common = __reduce_add_sync(kAll, common);
  __syncwarp();
  if (lane != 0) return;
  arguments.distance[b] = m + n - 2 * int64_t{common};
  labels.kept = offset + common;
  labels.last_slot = (arguments.source_slots ? length : labels.kept) - 1;
  TableRows rows{row, words};
  trace_back(rows, m, n, offset, labels);
}

// scratch: 2 ceil(T / 32) words for each sentence, or null where shared memory has them.
template <class Id>
__global__ void __launch_bounds__(kWarp)
    edit_distance_kernel(DistanceArguments<Id> arguments, uint32_t* scratch, int64_t scratch_words) {
  extern __shared__ uint32_t shared[];
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const Id* x = arguments.a + b * arguments.width;
  const Id* y = arguments.b + b * arguments.other_width;
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
    const Id token = x[i];
    uint32_t carry = 0, hp_in = 1, hn_in = 0;
    for (int64_t first = 0; first < words; first += kWarp) {
      const int64_t word = first + lane;
      const uint32_t match = warp_match(token, y, n, first, words, lane);
      const uint32_t p = word < words ? vp[word] : ~0u;
      if (!arguments.substitution) {
        const uint32_t next = warp_add(p, p & match, carry, lane) | (p & ~match);
        if (word < words) vp[word] = next;
        continue;
      }
      const uint32_t q = word < words ? vn[word] : 0u;
      const uint32_t d0 = (warp_add(match & p, p, carry, lane) ^ p) | match | q;
      const uint32_t hp = q | ~(d0 | p);
      const uint32_t hn = d0 & p;
      if (word == words - 1) {
        const int last_bit = static_cast<int>((n - 1) % kWarp);
        change += static_cast<int>((hp >> last_bit) & 1) - static_cast<int>((hn >> last_bit) & 1);
      }
      const uint32_t hp_below = __shfl_up_sync(kAll, hp, 1) >> 31;
      const uint32_t hn_below = __shfl_up_sync(kAll, hn, 1) >> 31;
      const uint32_t hp_shifted = (hp << 1) | (lane == 0 ? hp_in : hp_below);
      const uint32_t hn_shifted = (hn << 1) | (lane == 0 ? hn_in : hn_below);
      hp_in = __shfl_sync(kAll, hp, kWarp - 1) >> 31;
      hn_in = __shfl_sync(kAll, hn, kWarp - 1) >> 31;
      if (word < words) {
        vp[word] = hn_shifted | ~(d0 | hp_shifted);
        vn[word] = hp_shifted & d0;
      }
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

template <class Id, class Score>
__global__ void __launch_bounds__(kWarp) apply_edits_kernel(ApplyArguments<Id, Score> arguments) {
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int64_t width = arguments.width, out_width = arguments.out_width;
  const Id* row = arguments.tokens + b * width;
  const bool* deleted = arguments.delete_labels == nullptr ? nullptr : arguments.delete_labels + b * width;
  const int64_t* counts = arguments.insert == nullptr ? nullptr : arguments.insert + b * (width > 0 ? width - 1 : 0);
  const Id* fill = arguments.fill == nullptr ? nullptr : arguments.fill + b * out_width;
  const Score* scores = arguments.scores == nullptr ? nullptr : arguments.scores + b * width;
  Id* out = arguments.out_tokens + b * out_width;
  // not by `scores`: the data of an empty tensor is null as well
  Score* out_scores = arguments.out_scores == nullptr ? nullptr : arguments.out_scores + b * out_width;
  int64_t* origin = arguments.origin + b * out_width;

  const int64_t length = warp_length(row, width, arguments.pad_id, lane);
  auto stays = [&](int64_t i) {
    return i < length &&
           (deleted == nullptr || !deleted[i] || row[i] == arguments.bos_id || row[i] == arguments.eos_id);
  };
  int64_t kept = 0;
  for (int64_t base = 0; base < length; base += kWarp) kept += __popc(__ballot_sync(kAll, stays(base + lane)));
  const int64_t room = out_width > kept ? out_width - kept : 0;
  // How many placeholders the token of this rank wants behind it; the sum of all still fits in 64 bits.
  auto wanted = [&](int64_t rank) {
    if (counts == nullptr || rank + 1 >= kept) return int64_t{0};
    const int64_t count = counts[rank];
    return count < 0 ? int64_t{0} : count < room ? count : room;
  };
  auto inclusive_sum = [&](int64_t value) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t below = __shfl_up_sync(kAll, value, distance);
      if (lane >= distance) value += below;
    }
    return value;
  };

  int64_t total = 0;
  for (int64_t rank = lane; rank < kept; rank += kWarp) total += wanted(rank);
  total = __shfl_sync(kAll, inclusive_sum(total), kWarp - 1);
  const int64_t out_length = (kept < out_width ? kept : out_width) + (total < room ? total : room);
  if (lane == 0) arguments.lengths[b] = out_length;
  for (int64_t k = lane; k < out_width; k += kWarp) {
    const Id placeholder = fill == nullptr ? static_cast<Id>(arguments.mask_id) : fill[k];
    out[k] = k < out_length ? placeholder : static_cast<Id>(arguments.pad_id);
    if (out_scores != nullptr) out_scores[k] = Score{0};
    origin[k] = -1;
  }
  __syncwarp();

  int64_t first_rank = 0, inserted = 0;  // of tokens and of placeholders wanted in front of this chunk
  for (int64_t base = 0; base < length; base += kWarp) {
    const int64_t i = base + lane;
    const bool here = stays(i);
    const unsigned all_here = __ballot_sync(kAll, here);
    const int64_t rank = first_rank + __popc(all_here & ((1u << lane) - 1));
    const int64_t mine = here ? wanted(rank) : 0;
    const int64_t sum = inclusive_sum(mine);
    const int64_t before = inserted + sum - mine;
    if (here && out_width > 0 && (kept <= out_width || rank < out_width - 1 || rank == kept - 1)) {
      const int64_t k = kept > out_width && rank == kept - 1 ? out_width - 1 : rank + (before < room ? before : room);
      const Id token = row[i];
      out[k] = fill != nullptr && token == arguments.mask_id ? fill[k] : token;
      if (out_scores != nullptr) out_scores[k] = scores[i];
      origin[k] = i;
    }
    first_rank += __popc(all_here);
    inserted += __shfl_sync(kAll, sum, kWarp - 1);
  }
}

}  // namespace
}  // namespace condgen_fast::levenshtein
