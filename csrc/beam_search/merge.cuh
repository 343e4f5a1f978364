// beam_topk, second: a warp for each sentence merges the candidates of its rows' pieces.
#pragma once

#include "sections.cuh"

namespace condgen_fast::beam_search {
namespace {

// The first of a list that is not in the result. A row has a list for each of its pieces and one for its adjusted
// tokens. Higher total goes first, then lower parent, then higher logit, then lower token.
struct Head {
  float total;
  int list;  // negative: none
  Candidate key;

  __device__ bool before(const Head& other, int per_row) const {
    if (list < 0 || other.list < 0) return list >= 0;
    if (total != other.total) return total > other.total;
    const int parent = list / per_row, other_parent = other.list / per_row;
    return parent != other_parent ? parent < other_parent : key > other.key;
  }
};

template <class Logit>
struct Merge {
  const Arguments<Logit>& arguments;
  const Sections& sections;
  const int64_t b;
  const int per_row;  // lists

  __device__ int64_t row(int list) const { return b * arguments.beams + list / per_row; }
  __device__ List& entry(int list) const { return sections.lists[b * arguments.beams * per_row + list]; }

  __device__ float total(int list, Candidate key) const {
    const List& of = entry(list);
    const float below = (logit_of(key) - of.highest) / arguments.temperature;
    return arguments.scores[row(list)] + (below - of.log_sum);
  }

  __device__ void open(int list) const {
    float top = minus_infinity();
    double sum = 0.0;
    if (isfinite(arguments.scores[row(list)])) {
      const float* highest = sections.highest + row(list) * sections.per_row;
      for (int64_t i = 0; i < sections.per_row; ++i) top = highest[i] > top ? highest[i] : top;
      for (int64_t i = 0; i < sections.per_row && isfinite(top); ++i) {
        if (highest[i] == minus_infinity()) continue;
        const double power = exp2f((highest[i] - top) * arguments.power_scale);
        sum += sections.sums[row(list) * sections.per_row + i] * power;
      }
    }
    entry(list) = {top, isfinite(top) ? static_cast<float>(log(sum)) : __int_as_float(0x7fffffff), 0.0f, 0, 0};
  }

  __device__ Head head(int list) const {
    const List& of = entry(list);
    if (isnan(of.log_sum)) return Head{0.0f, -1, 0};
    const int piece = list % per_row;
    if (piece == sections.pieces) return adjusted_head(list);
    if (of.used >= sections.kept) return Head{0.0f, -1, 0};
    const Candidate key = sections.best[(row(list) * sections.pieces + piece) * sections.kept + of.used];
    return key == 0 ? Head{0.0f, -1, 0} : Head{total(list, key), list, key};
  }

  // Adjusted tokens are few and not sorted: the best of those that come after the last.
  __device__ Head adjusted_head(int list) const {
    const int64_t i = list / per_row;
    const Lists<Logit> lists(arguments, b, i);
    const Logit* logits = arguments.logits + b * arguments.sentence_stride + i * arguments.beam_stride;
    const List& of = entry(list);
    const Head last{of.last_total, of.used > 0 ? list : -1, of.last_key};
    Head best{0.0f, -1, 0};
    for (int64_t j = 0; j < lists.adjustments; ++j) {
      const int64_t token = lists.adjusted[j];
      if (token < 0 || token >= arguments.vocab || !(lists.amounts[j] > minus_infinity())) continue;
      const Candidate key = candidate(static_cast<float>(logits[token]), token);
      if (!(logit_of(key) > minus_infinity())) continue;
      Head mine{total(list, key), list, key};
      for (int64_t other = 0; other < lists.adjustments; ++other) {
        if (lists.adjusted[other] == token) mine.total += lists.amounts[other];
      }
      if (!(mine.total > minus_infinity()) || !lists.is_allowed(token)) continue;
      if ((last.list < 0 || last.before(mine, per_row)) && mine.before(best, per_row)) best = mine;
    }
    return best;
  }
};

template <class Logit>
__global__ void __launch_bounds__(kWarpSize) merge_kernel(Arguments<Logit> arguments, Sections sections) {
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x;
  const int per_row = static_cast<int>(sections.pieces) + (arguments.adjustments > 0 ? 1 : 0);
  const int count = static_cast<int>(arguments.beams) * per_row;
  const Merge<Logit> merge{arguments, sections, b, per_row};
  const Head none{0.0f, -1, 0};

  Head mine = none;  // the first of this lane's lists
  for (int list = lane; list < count; list += kWarpSize) {
    merge.open(list);
    const Head head = merge.head(list);
    if (head.before(mine, per_row)) mine = head;
  }

  for (int64_t place = b * arguments.k; place < (b + 1) * arguments.k; ++place) {
    Head winner = mine;
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      Head other;
      other.total = __shfl_xor_sync(kWholeWarp, winner.total, distance);
      other.list = __shfl_xor_sync(kWholeWarp, winner.list, distance);
      other.key = __shfl_xor_sync(kWholeWarp, winner.key, distance);
      if (other.before(winner, per_row)) winner = other;
    }
    const bool real = winner.list >= 0 && winner.total > minus_infinity();
    if (lane == 0) {
      arguments.out_scores[place] = real ? winner.total : minus_infinity();
      arguments.out_parents[place] = real ? winner.list / per_row : 0;
      arguments.out_tokens[place] = real ? token_of(winner.key) : 0;
    }
    if (winner.list >= 0 && winner.list % kWarpSize == lane) {
      List& entry = merge.entry(winner.list);
      ++entry.used;
      entry.last_total = winner.total;
      entry.last_key = winner.key;
      mine = none;
      for (int list = lane; list < count; list += kWarpSize) {
        const Head head = merge.head(list);
        if (head.before(mine, per_row)) mine = head;
      }
    }
  }
}

}  // namespace
}  // namespace condgen_fast::beam_search
