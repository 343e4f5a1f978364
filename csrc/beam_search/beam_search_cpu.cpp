#include "beam_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/simd.h"

namespace condgen_fast::beam_search::CONDGEN_FAST_ISA {

namespace {

using simd::Vec;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kLanes = simd::kLanes;
constexpr int64_t kStep = 4 * kLanes;
constexpr int64_t kColumn = kBlock / kStep;
static_assert(kBlock % kStep == 0);

Candidate candidate(float logit, int64_t token) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 and 0 are one value
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(~token);
}

float logit_of(Candidate candidate) {
  const uint32_t ordered = static_cast<uint32_t>(candidate >> 32);
  return std::bit_cast<float>(ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered);
}

int64_t token_of(Candidate candidate) { return static_cast<uint32_t>(~candidate); }

// Candidates of a piece: the best `wanted` of those added, and some more until there are too many.
struct Best {
  int64_t wanted;
  std::vector<Candidate>& pool;  // at least 2 * wanted + kColumn
  int64_t count = 0;
  Candidate entry = 0;  // what a candidate has to exceed; 0 until `wanted` are known to

  // As often as not a logit of a promising column is none to take, so this does not branch on it. `trim` has to follow
  // within kColumn calls.
  void add(Candidate candidate, bool take) {
    pool[count] = candidate;
    count += take && candidate > entry;
  }

  void trim() {
    if (count > 2 * wanted) drop_the_rest();
  }

  // Writes the best in descending order -> how many.
  int64_t finish(Candidate* out) {
    if (count > wanted) drop_the_rest();
    std::sort(pool.begin(), pool.begin() + count, std::greater<>());
    std::copy(pool.begin(), pool.begin() + count, out);
    return count;
  }

 private:
  void drop_the_rest() {
    std::nth_element(pool.begin(), pool.begin() + wanted - 1, pool.begin() + count, std::greater<>());
    count = wanted;
    entry = pool[wanted - 1];
  }
};

// `count` logits as floats, followed by -inf up to a multiple of kStep: where they are, or in `buffer` [kBlock].
template <class Logit>
const float* as_floats(const Logit* logits, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<Logit, float>) {
    if (count % kStep == 0) return logits;
  }
  if constexpr (std::is_same_v<Logit, double>) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<float>(logits[i]);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) simd::store(buffer + i, simd::load(logits + i));
    for (; i < count; ++i) buffer[i] = simd::to_float(logits[i]);
  }
  const int64_t end = (count + kStep - 1) / kStep * kStep;
  std::fill(buffer + count, buffer + end, -kInfinity);
  return buffer;
}

// Column c of a block: logits c, c + kStep, c + 2 kStep, ... Their highest go to `columns` [kStep], and to `overall`
// [kStep] where they exceed it; the block's highest is returned.
float highest(const float* x, int64_t count, float* columns, float* overall) {
  Vec high[4];
  for (Vec& part : high) part = Vec(-kInfinity);
  for (int64_t i = 0; i < count; i += kStep) {
    for (int j = 0; j < 4; ++j) high[j] = max(simd::load(x + i + j * kLanes), high[j]);
  }
  for (int j = 0; j < 4; ++j) {
    simd::store(columns + j * kLanes, high[j]);
    simd::store(overall + j * kLanes, max(high[j], simd::load(overall + j * kLanes)));
  }
  return reduce_max(max(max(high[0], high[1]), max(high[2], high[3])));
}

// 2^x for x <= 0, and for NaN as for the lowest x: relative error 1.6e-7 down to 2^-126, which is as low as it gets;
// sums of 1 or more do not feel the difference. simd::exp would take twice the instructions.
Vec power_of_two(Vec x) {
  x = max(x, Vec(-126.0f));
  const Vec shift(0x1.8p23f);  // adding it rounds to an integer, which is then in the low bits
  const Vec shifted = x + shift;
  const Vec f = x - (shifted - shift);
  Vec p(0.00132647261f);  // minimax on [-0.5, 0.5]
  p = fma(p, f, Vec(0.00967151299f));
  p = fma(p, f, Vec(0.0555073358f));
  p = fma(p, f, Vec(0.240222424f));
  p = fma(p, f, Vec(0.693147004f));
  p = fma(p, f, Vec(1.0f));
  const simd::Words exponent = reinterpret_cast<simd::Words>(shifted.raw) << 23;
  return reinterpret_cast<simd::Floats>(reinterpret_cast<simd::Words>(p.raw) + exponent);
}

// of 2^((x - highest) * scale)
float sum_of_powers(const float* x, int64_t count, float highest, float scale) {
  const Vec top(highest), factor(scale);
  Vec sums[4];
  for (Vec& part : sums) part = Vec(0.0f);
  for (int64_t i = 0; i < count; i += kStep) {
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + power_of_two((simd::load(x + i + j * kLanes) - top) * factor);
  }
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The k-th highest of `columns`, the highest of each: at least k logits are no lower. -inf if there are fewer columns.
float lower_bound_of_kth(const float* columns, int64_t k) {
  if (k > kStep) return -kInfinity;
  float sorted[kStep];
  std::copy(columns, columns + kStep, sorted);
  std::nth_element(sorted, sorted + k - 1, sorted + kStep, std::greater<>());
  return sorted[k - 1];
}

float value_of(float logit) { return logit; }
float value_of(double logit) { return static_cast<float>(logit); }
template <class Logit>
float value_of(Logit logit) {
  return simd::to_float(logit);
}

// Takes the logits of a block that are no lower than `least`, which is above -inf, looking only into columns that have
// such.
template <class Logit>
void collect(const Logit* logits, int64_t count, const float* columns, float least, int64_t first_token, Best& best) {
  for (int64_t group = 0; group < kStep; group += kLanes) {
    uint32_t hits = bits(simd::load(columns + group) >= Vec(least));
    for (; hits != 0; hits &= hits - 1) {
      for (int64_t i = group + std::countr_zero(hits); i < count; i += kStep) {
        const float value = value_of(logits[i]);
        best.add(candidate(value, first_token + i), value >= least);
      }
      best.trim();
    }
  }
}

// Appends logits of -inf or NaN, which `collect` never takes, to too few others -> how many there are then.
template <class Logit>
int64_t fill_up(const Logit* row, int64_t begin, int64_t end, Candidate* best, int64_t count, int64_t wanted) {
  for (int64_t token = begin; token < end && count < wanted; ++token) {
    if (!(value_of(row[token]) > -kInfinity)) best[count++] = candidate(-kInfinity, token);
  }
  return count;
}

}  // namespace

template <class Logit>
void scan(const Arguments<Logit>& arguments, const Pieces& pieces, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock], overall[kStep];
  std::vector<float> columns(pieces.blocks * kStep);
  std::vector<Candidate> pool(2 * pieces.kept + kColumn);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = pieces.rows[piece / pieces.per_row];
    const Logit* logits = arguments.logits + row / arguments.beams * arguments.sentence_stride +
                          row % arguments.beams * arguments.beam_stride;
    const int64_t piece_begin = piece % pieces.per_row * pieces.blocks * kBlock;
    const int64_t piece_end = std::min(piece_begin + pieces.blocks * kBlock, arguments.vocab);
    float* highest_of = pieces.highest + piece * pieces.blocks;
    float* sum_of = pieces.sums + piece * pieces.blocks;
    std::fill(overall, overall + kStep, -kInfinity);
    for (int64_t block = 0; block < pieces.blocks; ++block) {
      const int64_t first = piece_begin + block * kBlock;
      const int64_t count = std::min(kBlock, piece_end - first);
      highest_of[block] = -kInfinity;
      sum_of[block] = 0.0f;
      if (count <= 0) continue;
      const float* x = as_floats(logits + first, count, buffer);
      const int64_t padded = (count + kStep - 1) / kStep * kStep;
      highest_of[block] = highest(x, padded, columns.data() + block * kStep, overall);
      if (std::abs(highest_of[block]) < kInfinity) {
        sum_of[block] = sum_of_powers(x, padded, highest_of[block], arguments.power_scale);
      }
    }

    // Now that k logits are known to reach `bound`, few blocks have anything for the k best.
    Best best{std::min(pieces.kept, piece_end - piece_begin), pool};
    const float bound = std::max(lower_bound_of_kth(overall, best.wanted), kLowest);
    for (int64_t block = 0; block < pieces.blocks; ++block) {
      const float least = best.entry == 0 ? bound : std::max(bound, std::nextafter(logit_of(best.entry), kInfinity));
      if (!(highest_of[block] >= least)) continue;
      const int64_t first = piece_begin + block * kBlock;
      collect(logits + first, std::min(kBlock, piece_end - first), columns.data() + block * kStep, least, first, best);
    }
    Candidate* out = pieces.best + piece * pieces.kept;
    const int64_t found = best.finish(out);
    pieces.found[piece] = fill_up(logits, piece_begin, piece_end, out, found, best.wanted);
  }
}

namespace {

// What a row amounts to when all its pieces are in.
struct Row {
  const Candidate* best;  // null: an empty beam, whose candidates are tokens in order
  float score, highest, log_sum;

  float total(int64_t place, float temperature) const {
    if (best == nullptr) return -kInfinity;
    return score + ((logit_of(best[place]) - highest) / temperature - log_sum);
  }
};

Row finish_row(const Pieces& pieces, int64_t row, float score, float scale, int64_t wanted) {
  const int64_t blocks = pieces.per_row * pieces.blocks;
  const float* highest_of = pieces.highest + row * blocks;
  const float* sum_of = pieces.sums + row * blocks;
  const float top = *std::max_element(highest_of, highest_of + blocks);
  if (!(std::abs(top) < kInfinity)) return {nullptr, -kInfinity, top, 0.0f};
  double sum = 0.0;
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int64_t count = std::min(kLanes, blocks - first);
    const Vec below = simd::load_first(highest_of + first, count, -kInfinity) - Vec(top);
    const Vec powers = power_of_two(below * Vec(scale));
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(sum_of[first + i]) * powers[i];
  }
  Candidate* best = pieces.best + row * pieces.per_row * pieces.kept;
  if (pieces.per_row > 1) {
    int64_t count = 0;
    for (int64_t p = 0; p < pieces.per_row; ++p) {
      const Candidate* from = pieces.best + (row * pieces.per_row + p) * pieces.kept;
      std::copy(from, from + pieces.found[row * pieces.per_row + p], best + count);
      count += pieces.found[row * pieces.per_row + p];
    }
    std::partial_sort(best, best + wanted, best + count, std::greater<>());
  }
  return {best, score, top, static_cast<float>(std::log(sum))};
}

}  // namespace

template <class Logit>
void merge(const Arguments<Logit>& arguments, const Pieces& pieces, const int64_t* row_of, int64_t begin, int64_t end) {
  const int64_t beams = arguments.beams, k = arguments.k;
  const int64_t per_row = std::min(k, arguments.vocab);
  const float scale = arguments.power_scale;
  std::vector<Row> rows(beams);
  std::vector<int64_t> used(beams);  // candidates of a row that are in the result
  std::vector<float> next(beams);    // total of the first that is not
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t i = 0; i < beams; ++i) {
      const int64_t row = row_of[b * beams + i];
      rows[i] = row < 0 ? Row{nullptr, 0.0f, 0.0f, 0.0f}
                        : finish_row(pieces, row, arguments.scores[b * beams + i], scale, per_row);
      used[i] = 0;
      next[i] = rows[i].total(0, arguments.temperature);
    }
    for (int64_t place = b * k; place < (b + 1) * k; ++place) {
      int64_t parent = -1;
      for (int64_t i = 0; i < beams; ++i) {
        if (used[i] < per_row && (parent < 0 || next[i] > next[parent])) parent = i;
      }
      if (parent < 0) {
        arguments.out_scores[place] = -kInfinity;
        arguments.out_parents[place] = arguments.out_tokens[place] = 0;
        continue;
      }
      const Row& row = rows[parent];
      arguments.out_scores[place] = next[parent];
      arguments.out_parents[place] = parent;
      arguments.out_tokens[place] = row.best == nullptr ? used[parent] : token_of(row.best[used[parent]]);
      if (++used[parent] < per_row) next[parent] = row.total(used[parent], arguments.temperature);
    }
  }
}

#define INSTANTIATE(Logit)                                                             \
  template void scan<Logit>(const Arguments<Logit>&, const Pieces&, int64_t, int64_t); \
  template void merge<Logit>(const Arguments<Logit>&, const Pieces&, const int64_t*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(simd::BFloat16)
INSTANTIATE(simd::Half)
#undef INSTANTIATE

}  // namespace condgen_fast::beam_search::CONDGEN_FAST_ISA
