// Deletion, insertion and filling by ballots and prefix sums.
#pragma once

#include "levenshtein/warp.cuh"

namespace condgen_fast::levenshtein {
namespace {

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
  const int64_t bound =
      arguments.bounds == nullptr || arguments.bounds[b] > out_width ? out_width : arguments.bounds[b];
  const int64_t room = bound > kept ? bound - kept : 0;
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
