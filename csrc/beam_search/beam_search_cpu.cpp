#include "beam_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "power_of_two.h"

namespace condgen_fast::beam_search::CONDGEN_FAST_ISA {

namespace {

using simd::Vec;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kLanes = simd::kLanes;
static_assert(kColumns % (4 * kLanes) == 0 && kBlock % kColumns == 0);
constexpr int64_t kCacheLine = 64;  // bytes
constexpr float kMostAbove = 64;    // powers of two; the sum of a block stays within float32

float value_of(float logit) { return logit; }
float value_of(double logit) { return static_cast<float>(logit); }
template <class Logit>
float value_of(Logit logit) {
  return simd::to_float(logit);
}

template <class Logit>
Vec load(const Logit* from) {
  if constexpr (std::is_same_v<Logit, double>) {
    float values[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) values[i] = static_cast<float>(from[i]);
    return simd::load(values);
  } else {
    return simd::load(from);
  }
}

template <class Logit>
Logit lowest_value() {
  if constexpr (std::is_same_v<Logit, double>) {
    return -kInfinity;
  } else {
    return simd::from_float<Logit>(-kInfinity);
  }
}

// Of BFloat16 two vectors are read at once: the even logits of both, then the odd ones.
template <class Logit>
constexpr bool kAlternate = std::is_same_v<Logit, simd::BFloat16>;

// Where the logits of a column begin.
template <class Logit>
int64_t first_of_column(int64_t column) {
  if constexpr (kAlternate<Logit>) {
    const int64_t place = column % (2 * kLanes);
    return column - place + place % kLanes * 2 + place / kLanes;
  } else {
    return column;
  }
}

// Asks for the logits that are read next but some: the processor by itself asks for too few of a row that is not in its
// own cache (0.65 of the time where it is in the shared one).
template <class Logit>
void prefetch_after(const Logit* x) {
  constexpr int64_t kBytesAhead = 16384;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(x) + kBytesAhead));
}

float highest_of(const float* x, int64_t count) {
  Vec high(-kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) high = max(load(x + i), high);
  if (i < count) high = max(simd::load_first(x + i, count - i, -kInfinity), high);
  return reduce_max(high);
}

// The highest of each column, and PowerOfTwo's sum.
template <bool kFused, class Logit>
float sweep_block(const Logit* x, int64_t count, const PowerOfTwo& power, float* columns) {
  constexpr int64_t kVectors = kColumns / kLanes, kSums = 4;
  Vec high[kVectors], sums[kSums];
  for (Vec& each : high) each = Vec(-kInfinity);
  for (Vec& each : sums) each = Vec(0.0f);
  const auto add = [&](Vec value, int64_t j) __attribute__((always_inline)) {
    high[j] = max(value, high[j]);
    sums[j % kSums] = power.add<kFused>(value, sums[j % kSums]);
  };
  const auto add_row = [&](const Logit* row) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < kVectors; j += 1 + kAlternate<Logit>) {
      const Logit* from = row + j * kLanes;
      if (j * kLanes * sizeof(Logit) % kCacheLine == 0) prefetch_after(from);
      if constexpr (kAlternate<Logit>) {
        Vec even, odd;
        simd::load_alternate(from, even, odd);
        add(even, j);
        add(odd, j + 1);
      } else {
        add(load(from), j);
      }
    }
  };
  int64_t i = 0;
  for (; i + kColumns <= count; i += kColumns) add_row(x + i);
  if (i < count) {
    Logit rest[kColumns];
    std::fill(std::copy(x + i, x + count, rest), rest + kColumns, lowest_value<Logit>());
    add_row(rest);
  }
  for (int64_t j = 0; j < kVectors; ++j) simd::store(columns + j * kLanes, high[j]);
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The first logit that is a number, 0 if there is none.
template <class Logit>
float first_number(const Logit* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = value_of(x[i]);
    if (std::abs(value) < kInfinity) return value;
  }
  return 0.0f;
}

}  // namespace

template <class Logit>
void sweep(const Arguments<Logit>& arguments, const Blocks& blocks, int64_t first_row, int64_t begin, int64_t end) {
  const float scale = arguments.power_scale;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks.per_row, block = unit % blocks.per_row;
    if (!std::isfinite(arguments.scores[row])) continue;
    const int64_t b = row / arguments.beams, i = row % arguments.beams;
    const int64_t from = block * kBlock, count = std::min(kBlock, arguments.vocab - from);
    const Logit* x = arguments.logits + b * arguments.sentence_stride + i * arguments.beam_stride + from;
    const int64_t place = (row - first_row) * blocks.per_row + block;
    float* columns = blocks.columns + place * kColumns;
    // The powers are of what a logit stands above any one of them, so there is one sweep. Where the highest stands too
    // far above it to be added up, the block is swept again.
    float origin = first_number(x, count), highest = 0.0f;
    double sum = 0.0, shift = 0.0;
    for (bool again = true; again;) {
      if (PowerOfTwo::can_fuse(origin, scale)) {
        const PowerOfTwo power = PowerOfTwo::fused(origin, scale);
        sum = sweep_block<true>(x, count, power, columns);
        shift = power.shift();
      } else {
        const PowerOfTwo power = PowerOfTwo::plain(origin, scale);
        sum = sweep_block<false>(x, count, power, columns);
        shift = power.shift();
      }
      highest = highest_of(columns, kColumns);
      again = std::abs(highest) < kInfinity && (static_cast<double>(highest) - origin) * scale > kMostAbove;
      if (again) origin = highest;
    }
    blocks.highest[place] = highest;
    blocks.shifts[place] = shift;
    blocks.sums[place] = std::abs(highest) < kInfinity ? PowerOfTwo::unit * sum : 0.0;
  }
}

namespace {

// A row when all its blocks are in.
struct Row {
  bool alive;
  float score, top, log_sum;

  float total(float logit, float temperature) const { return score + ((logit - top) / temperature - log_sum); }
  Vec total(Vec logits, float temperature) const {
    return Vec(score) + ((logits - Vec(top)) / Vec(temperature) - Vec(log_sum));
  }
};

// 2^n for -1022 <= n <= 1023
double integer_power(double n) {
  return std::bit_cast<double>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

Row finish_row(const Blocks& blocks, int64_t place, float score, float scale) {
  const float top = highest_of(blocks.highest + place * blocks.per_row, blocks.per_row);
  if (!(std::abs(top) < kInfinity)) return {false, score, top, 0.0f};
  const double exponent = static_cast<double>(top) * scale, origin = std::floor(exponent);
  double sum = 0.0;
  for (int64_t block = place * blocks.per_row; block < (place + 1) * blocks.per_row; ++block) {
    const double above = blocks.shifts[block] - origin;
    if (above < -1000 || blocks.sums[block] == 0) continue;
    sum += blocks.sums[block] * (above == std::floor(above) ? integer_power(above) : std::exp2(above));
  }
  constexpr double kLogOfTwo = 0.69314718055994531;
  const double log_sum = std::log(sum) - (exponent - origin) * kLogOfTwo;
  return {true, score, top, static_cast<float>(std::max(log_sum, 0.0))};  // the highest's own power is among them
}

struct Candidate {
  float total, logit;
  int32_t parent, token;

  bool before(const Candidate& other) const {
    if (total != other.total) return total > other.total;
    if (parent != other.parent) return parent < other.parent;
    if (logit != other.logit) return logit > other.logit;
    return token < other.token;
  }
};

bool before(const Candidate& a, const Candidate& b) { return a.before(b); }

// The best `wanted` of the candidates added, and some more until there are too many.
class Best {
 public:
  Best(int64_t wanted, std::vector<Candidate>& pool) : wanted_(wanted), pool_(pool) { pool_.clear(); }

  // No candidate below it is among the best.
  float bound = kLowest;

  void add(const Candidate& candidate) {
    pool_.push_back(candidate);
    if (static_cast<int64_t>(pool_.size()) >= 2 * wanted_ + kSpare) drop_the_rest();
  }

  int64_t finish() {
    if (static_cast<int64_t>(pool_.size()) > wanted_) drop_the_rest();
    std::sort(pool_.begin(), pool_.end(), before);
    return static_cast<int64_t>(pool_.size());
  }

 private:
  static constexpr int64_t kSpare = 64;
  const int64_t wanted_;
  std::vector<Candidate>& pool_;

  void drop_the_rest() {
    std::nth_element(pool_.begin(), pool_.begin() + wanted_ - 1, pool_.end(), before);
    pool_.resize(wanted_);
    bound = std::max(bound, pool_.back().total);
  }
};

// One sentence: its rows, and what each of them may be continued with.
template <class Logit>
class Sentence {
 public:
  Sentence(const Arguments<Logit>& arguments, const Blocks& blocks, int64_t b, int64_t first_row,
           std::vector<Row>& rows)
      : arguments_(arguments), blocks_(blocks), b_(b), first_place_(b * arguments.beams - first_row), rows_(rows) {
    for (int64_t i = 0; i < arguments.beams; ++i) {
      const float score = arguments.scores[b * arguments.beams + i];
      rows_[i] = std::isfinite(score) && arguments.vocab > 0
                     ? finish_row(blocks, first_place_ + i, score, arguments.power_scale)
                     : Row{false, score, 0.0f, 0.0f};
    }
  }

  // A total that at least `wanted` continuations reach, from the totals of the columns' highest logits; -inf: unknown.
  float bound(int64_t wanted, std::vector<float>& bins) const {
    for (int64_t i = 0; i < arguments_.beams; ++i) {
      const int64_t* tokens = adjusted(i);
      for (int64_t j = 0; j < arguments_.adjustments && rows_[i].alive; ++j) wanted += is_token(tokens[j]);
    }
    // Bins are columns of all blocks of some rows. Four for each wanted make the bound a close one.
    const int64_t groups = std::clamp<int64_t>(4 * wanted / kColumns, 1, arguments_.beams);
    if (wanted > groups * kColumns) return finest_bound(wanted, bins);
    bins.assign(groups * kColumns, -kInfinity);
    for (int64_t i = 0; i < arguments_.beams; ++i) {
      if (!rows_[i].alive || restricted(i)) continue;
      const float* columns = blocks_.columns + (first_place_ + i) * blocks_.per_row * kColumns;
      float* bin = bins.data() + i % groups * kColumns;
      for (int64_t c = 0; c < kColumns; c += kLanes) {
        Vec high = simd::load(columns + c);
        for (int64_t block = 1; block < blocks_.per_row; ++block) {
          high = max(simd::load(columns + block * kColumns + c), high);
        }
        simd::store(bin + c, max(rows_[i].total(high, arguments_.temperature), simd::load(bin + c)));
      }
    }
    std::nth_element(bins.begin(), bins.begin() + wanted - 1, bins.end(), std::greater<>());
    return bins[wanted - 1];
  }

  void collect(Best& best) const {
    for (int64_t i = 0; i < arguments_.beams; ++i) {
      const Row& row = rows_[i];
      if (!row.alive) continue;
      if (restricted(i)) {
        for (int64_t j = first(i); j < last(i); ++j) {
          if (is_token(arguments_.allowed[j])) add(i, arguments_.allowed[j], best);
        }
        continue;
      }
      // The lowest logit that can reach the bound, and a little less for what rounding does to the totals.
      const double distance = static_cast<double>(best.bound) - row.score + row.log_sum;
      const double slack = 1e-6 * (std::abs(best.bound) + std::abs(row.score) + std::abs(row.log_sum));
      const double lowest = row.top + (distance - slack) * arguments_.temperature;
      const float least = static_cast<float>(std::clamp<double>(lowest - 1e-6 * std::abs(lowest), kLowest, kInfinity));
      const int64_t first_block = (first_place_ + i) * blocks_.per_row;
      for (int64_t block = 0; block < blocks_.per_row; ++block) {
        if (blocks_.highest[first_block + block] >= least) collect_block(i, block, least, best);
      }
      const int64_t* tokens = adjusted(i);
      for (int64_t j = 0; j < arguments_.adjustments; ++j) {
        if (is_token(tokens[j]) && !repeated(tokens, j)) add(i, tokens[j], best);
      }
    }
  }

 private:
  const Arguments<Logit>& arguments_;
  const Blocks& blocks_;
  const int64_t b_, first_place_;  // place: row of the sentence among those that `blocks` holds
  std::vector<Row>& rows_;

  bool is_token(int64_t token) const { return token >= 0 && token < arguments_.vocab; }
  const Logit* logits(int64_t i) const {
    return arguments_.logits + b_ * arguments_.sentence_stride + i * arguments_.beam_stride;
  }
  const int64_t* adjusted(int64_t i) const {
    return arguments_.adjusted + b_ * arguments_.adjusted_sentence_stride + i * arguments_.adjusted_beam_stride;
  }
  int64_t first(int64_t i) const { return arguments_.first[b_ * arguments_.beams + i]; }
  int64_t last(int64_t i) const { return arguments_.last[b_ * arguments_.beams + i]; }
  bool restricted(int64_t i) const { return arguments_.first != nullptr && first(i) >= 0; }

  static bool repeated(const int64_t* tokens, int64_t j) {
    return std::find(tokens, tokens + j, tokens[j]) != tokens + j;
  }
  bool is_adjusted(int64_t i, int64_t token) const {
    const int64_t* tokens = adjusted(i);
    return std::find(tokens, tokens + arguments_.adjustments, token) != tokens + arguments_.adjustments;
  }

  void add(int64_t i, int64_t token, Best& best) const {
    const float logit = value_of(logits(i)[token]);
    if (!(logit > -kInfinity)) return;
    Candidate candidate{rows_[i].total(logit, arguments_.temperature), logit, static_cast<int32_t>(i),
                        static_cast<int32_t>(token)};
    const int64_t offset = adjusted(i) - arguments_.adjusted;
    for (int64_t j = 0; j < arguments_.adjustments; ++j) {
      if (arguments_.adjusted[offset + j] == token) candidate.total += arguments_.amounts[offset + j];
    }
    if (candidate.total >= best.bound) best.add(candidate);
  }

  void collect_block(int64_t i, int64_t block, float least, Best& best) const {
    const Row& row = rows_[i];
    const Logit* x = logits(i) + block * kBlock;
    const int64_t count = std::min(kBlock, arguments_.vocab - block * kBlock);
    const float* columns = blocks_.columns + ((first_place_ + i) * blocks_.per_row + block) * kColumns;
    for (int64_t group = 0; group < kColumns; group += kLanes) {
      uint32_t hits = bits(simd::load(columns + group) >= Vec(least));
      for (; hits != 0; hits &= hits - 1) {
        int64_t place = first_of_column<Logit>(group + std::countr_zero(hits));
        for (; place < count; place += kColumns) {
          const float value = value_of(x[place]);
          if (!(value >= least)) continue;
          const float total = row.total(value, arguments_.temperature);
          const int64_t token = block * kBlock + place;
          if (total >= best.bound && !is_adjusted(i, token)) {
            best.add({total, value, static_cast<int32_t>(i), static_cast<int32_t>(token)});
          }
        }
      }
    }
  }

  // As `bound`, a bin being a column of one block.
  float finest_bound(int64_t wanted, std::vector<float>& bins) const {
    const int64_t of_row = blocks_.per_row * kColumns;
    if (wanted > arguments_.beams * of_row) return -kInfinity;
    bins.clear();
    for (int64_t i = 0; i < arguments_.beams; ++i) {
      if (!rows_[i].alive || restricted(i)) continue;
      const float* columns = blocks_.columns + (first_place_ + i) * of_row;
      for (int64_t c = 0; c < of_row; ++c) bins.push_back(rows_[i].total(columns[c], arguments_.temperature));
    }
    if (static_cast<int64_t>(bins.size()) < wanted) return -kInfinity;
    std::nth_element(bins.begin(), bins.begin() + wanted - 1, bins.end(), std::greater<>());
    return bins[wanted - 1];
  }
};

}  // namespace

template <class Logit>
void select(const Arguments<Logit>& arguments, const Blocks& blocks, int64_t first_row, int64_t begin, int64_t end) {
  const int64_t k = arguments.k, wanted = std::min(k, arguments.beams * arguments.vocab);
  std::vector<Row> rows(arguments.beams);
  std::vector<float> bins;
  std::vector<Candidate> found;
  for (int64_t b = begin; b < end; ++b) {
    int64_t count = 0;
    if (wanted > 0) {
      const Sentence sentence(arguments, blocks, b, first_row, rows);
      Best best(wanted, found);
      best.bound = std::max(sentence.bound(wanted, bins), kLowest);
      sentence.collect(best);
      count = best.finish();
    }
    for (int64_t place = 0; place < k; ++place) {
      const bool real = place < count;
      arguments.out_scores[b * k + place] = real ? found[place].total : -kInfinity;
      arguments.out_parents[b * k + place] = real ? found[place].parent : 0;
      arguments.out_tokens[b * k + place] = real ? found[place].token : 0;
    }
  }
}

#define INSTANTIATE(Logit)                                                                       \
  template void sweep<Logit>(const Arguments<Logit>&, const Blocks&, int64_t, int64_t, int64_t); \
  template void select<Logit>(const Arguments<Logit>&, const Blocks&, int64_t, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(simd::BFloat16)
INSTANTIATE(simd::Half)
#undef INSTANTIATE

}  // namespace condgen_fast::beam_search::CONDGEN_FAST_ISA
