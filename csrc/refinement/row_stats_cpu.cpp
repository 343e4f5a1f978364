#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/simd.h"
#include "refinement/noise.h"
#include "refinement/refinement.h"

namespace condgen_fast::refinement::CONDGEN_FAST_ISA {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int64_t kStride = 2 * kLanes;    // logits a round of the loops takes
constexpr float kLowestExponent = -87.0f;  // below it e^x counts as 1.6e-38, which no sum of 1 or more feels
constexpr float kHighestExponent = 60.0f;  // above it sums of e^x are taken anew, from a higher base
constexpr float kHighestAboveBase = 4.0f;  // likewise for sums of x e^x, which lose digits sooner

// e^x within 2.5e-7 of it, relatively, for kLowestExponent <= x <= 87; half the work of simd::exp, which takes any x.
// Beyond, any number: the chunk is then taken anew from a higher base. 2^f for |f| <= 1/2 by a minimax polynomial.
Vec exp_within(Vec x) {
  const Vec shift(0x1.8p23f);  // adding it rounds to an integer, which is then in the low bits
  const Vec shifted = simd::fma(x, Vec(1.44269504088896341f), shift);
  const Vec f = simd::fma(x, Vec(1.44269504088896341f), shift - shifted);
  Vec p(1.32647273e-3f);
  p = simd::fma(p, f, Vec(9.67151299e-3f));
  p = simd::fma(p, f, Vec(5.55073358e-2f));
  p = simd::fma(p, f, Vec(2.40222424e-1f));
  p = simd::fma(p, f, Vec(6.93147004e-1f));
  p = simd::fma(p, f, Vec(1.0f));
  using simd::Words;  // unsigned: beyond 87 the exponent wraps
  return reinterpret_cast<simd::Floats>(reinterpret_cast<Words>(p.raw) + (reinterpret_cast<Words>(shifted.raw) << 23));
}

float defined(float x) { return x != x ? -kInfinity : std::min(x, kLargest); }

template <class Logit>
float as_float(Logit x) {
  if constexpr (std::is_same_v<Logit, double>) {
    return static_cast<float>(x);
  } else {
    return simd::to_float(x);
  }
}

// Per lane the two highest logits of a row, and sums over a chunk.
struct Lanes {
  Vec highest0, highest1, second0, second1;
  Vec power0, power1, weighted0, weighted1, scaled0, scaled1;

  void begin_row() { highest0 = highest1 = second0 = second1 = Vec(-kInfinity); }
  void begin_chunk() { power0 = power1 = weighted0 = weighted1 = scaled0 = scaled1 = Vec(0.0f); }

  float power() const { return simd::reduce_sum(power0 + power1); }
  float weighted() const { return simd::reduce_sum(weighted0 + weighted1); }
  float scaled() const { return simd::reduce_sum(scaled0 + scaled1); }

  bool any_above(float x) const { return simd::any(simd::max(highest0, highest1) > Vec(x)); }
  float highest() const { return simd::reduce_max(simd::max(highest0, highest1)); }

  float second() const {  // over the row: the best of all but one lane's highest
    float all[2][2 * kLanes], highest = -kInfinity, second = -kInfinity;
    simd::store(all[0], highest0);
    simd::store(all[0] + kLanes, highest1);
    simd::store(all[1], second0);
    simd::store(all[1] + kLanes, second1);
    for (int64_t i = 0; i < 2 * kLanes; ++i) {
      second = std::max({second, all[1][i], std::min(highest, all[0][i])});
      highest = std::max(highest, all[0][i]);
    }
    return second;
  }

  // `count` logits, a multiple of kStride: one read. Sums of e^(x - base) and (x - base) e^(x - base), and where
  // kScaled of e^((x - base) * scale). NaN counts as -inf.
  template <bool kScaled, class From>
  void add(const From* x, int64_t count, float base, float scale) {
    const Vec subtracted(base), lowest(kLowestExponent), scales(scale);
    // In variables of their own: GCC 12 keeps members in memory.
    Vec h0 = highest0, h1 = highest1, s0 = second0, s1 = second1;
    Vec p0 = power0, p1 = power1, w0 = weighted0, w1 = weighted1, z0 = scaled0, z1 = scaled1;
    const auto add_one = [&](const From* from, Vec& highest, Vec& second, Vec& power_sum, Vec& weighted_sum,
                             Vec& scaled_sum) {
      const Vec value = simd::load(from);
      second = simd::max(simd::min(highest, value), second);  // min and max take the second of a NaN and a number
      highest = simd::max(value, highest);
      const Vec above = value - subtracted;
      const Vec exponent = simd::max(above, lowest), power = exp_within(exponent);
      power_sum = power_sum + power;
      weighted_sum = simd::fma(power, exponent, weighted_sum);
      if constexpr (kScaled) scaled_sum = scaled_sum + exp_within(simd::max(above * scales, lowest));
    };
    for (int64_t i = 0; i < count; i += kStride) {
      add_one(x + i, h0, s0, p0, w0, z0);
      add_one(x + i + kLanes, h1, s1, p1, w1, z1);
    }
    highest0 = h0, highest1 = h1, second0 = s0, second1 = s1;
    power0 = p0, power1 = p1, weighted0 = w0, weighted1 = w1, scaled0 = z0, scaled1 = z1;
  }
};

// One row, a chunk at a time. Sums are of powers above `base`, a logit that is the highest so far or close to it.
template <class Logit>
class Row {
 public:
  Row(const Logit* logits, int64_t width, float temperature) : logits_(logits), width_(width) {
    sampling_ = temperature > 0.0f;
    scaled_ = sampling_ && temperature != 1.0f;
    scale_ = scaled_ ? std::min(1.0f / temperature, kLargest) : 1.0f;
    limit_ = scaled_ ? std::min(kHighestAboveBase, kHighestExponent / scale_) : kHighestAboveBase;
    lanes_.begin_row();
  }

  void read(uint64_t seed, uint64_t noise_row) {
    for (int64_t first = 0; first < width_; first += kChunk) {
      if (!add_chunk(first)) continue;
      const double power = lanes_.power();
      powers_ += power;
      weighted_ += lanes_.weighted();
      if (sampling_) {
        const ChunkNoise noise = chunk_noise(seed, noise_row, static_cast<uint64_t>(first / kChunk));
        const double time = noise.exponential / (scaled_ ? lanes_.scaled() : power);
        if (time < best_time_) {
          best_time_ = time;
          drawn_chunk_ = first;
          uniform_ = noise.uniform;
        }
      }
      if (highest_ > base_) move_base(highest_);
    }
  }

  bool possible() const { return highest_ > -kInfinity; }
  double log_sum() const { return std::log(powers_); }
  float highest() const { return highest_; }
  double margin() const { return -std::expm1(double{lanes_.second()} - highest_) / powers_; }
  double entropy() const { return std::max(0.0, log_sum() - weighted_ / powers_); }
  float logit(int64_t token) const { return defined(as_float(logits_[token])); }

  int64_t best() const {
    const int64_t end = std::min(width_, highest_chunk_ + kChunk);
    int64_t i = highest_chunk_;
    if constexpr (!std::is_same_v<Logit, double>) {
      while (i + kLanes <= end && !simd::any(simd::load(logits_ + i) >= Vec(highest_))) i += kLanes;
    }
    while (i < end && !(as_float(logits_[i]) >= highest_)) ++i;  // +inf counts as the largest finite number
    return i;
  }

  // The column of the drawn chunk at which the sum of powers passes `uniform_` of their total.
  int64_t draw() const {
    constexpr int64_t kBlock = 128, kBlocks = kChunk / kBlock;
    const int64_t count = std::min(kChunk, width_ - drawn_chunk_);
    const Vec subtracted(highest_), lowest(kLowestExponent), scales(scale_), none(-kInfinity), zero(0.0f);
    float power[kChunk], buffer[kChunk];
    double sums[kBlocks], total = 0.0;
    copy_defined(logits_ + drawn_chunk_, count, kBlock, buffer);
    const int64_t blocks = (count + kBlock - 1) / kBlock;
    for (int64_t block = 0; block < blocks; ++block) {
      Vec sum(0.0f);
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += kLanes) {
        const Vec x = simd::load(buffer + i);
        const Vec e = exp_within(simd::max((x - subtracted) * scales, lowest));
        const Vec positive = simd::select(x > none, e, zero);
        simd::store(power + i, positive);
        sum = sum + positive;
      }
      total += sums[block] = simd::reduce_sum(sum);
    }
    double left = uniform_ * total;
    int64_t block = 0;
    while (block + 1 < blocks && left >= sums[block]) left -= sums[block++];
    int64_t token = -1;
    for (int64_t i = block * kBlock; i < blocks * kBlock; ++i) {
      if (power[i] == 0.0f) continue;
      token = i;
      if (left < power[i]) break;
      left -= power[i];
    }
    return token < 0 ? best() : drawn_chunk_ + token;
  }

 private:
  // The first count logits as floats, -inf for NaN and up to a multiple of `step`, +inf made finite.
  static void copy_defined(const Logit* x, int64_t count, int64_t step, float* buffer) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = defined(as_float(x[i]));
    for (int64_t i = count; i % step != 0; ++i) buffer[i] = -kInfinity;
  }

  // False where all of them are -inf or NaN.
  bool add_chunk(int64_t first) {
    const int64_t count = std::min(kChunk, width_ - first);
    if (base_ == -kInfinity) {
      move_base(highest_of(first, count));
      if (base_ == -kInfinity) return false;
    }
    const Lanes before = lanes_;
    sweep(first, count);
    if (!lanes_.any_above(highest_)) return true;
    float highest = lanes_.highest();
    if (highest > base_ + limit_ || highest > kLargest) {
      const bool infinite = highest > kLargest;
      highest = std::min(highest, kLargest);
      move_base(highest);
      lanes_ = before;
      infinite ? sweep_defined(first, count) : sweep(first, count);
    }
    if (highest > highest_) {  // else +inf here, which counts as what an earlier chunk has
      highest_ = highest;
      highest_chunk_ = first;
    }
    return true;
  }

  float highest_of(int64_t first, int64_t count) const {
    Vec lanes(-kInfinity);
    int64_t i = 0;
    if constexpr (!std::is_same_v<Logit, double>) {
      for (; i + kLanes <= count; i += kLanes) lanes = simd::max(simd::load(logits_ + first + i), lanes);
    }
    float highest = std::min(simd::reduce_max(lanes), kLargest);
    for (; i < count; ++i) highest = std::max(highest, defined(as_float(logits_[first + i])));
    return highest;
  }

  void sweep(int64_t first, int64_t count) {
    lanes_.begin_chunk();
    int64_t whole = 0;
    if constexpr (!std::is_same_v<Logit, double>) {
      whole = count / kStride * kStride;
      add(logits_ + first, whole);
    }
    if (whole < count) {
      float buffer[kChunk];
      const int64_t rest = count - whole, padded = (rest + kStride - 1) / kStride * kStride;
      for (int64_t i = 0; i < rest; ++i) buffer[i] = as_float(logits_[first + whole + i]);
      std::fill(buffer + rest, buffer + padded, -kInfinity);
      add(buffer, padded);
    }
  }

  void sweep_defined(int64_t first, int64_t count) {
    float buffer[kChunk];
    copy_defined(logits_ + first, count, kStride, buffer);
    lanes_.begin_chunk();
    add(buffer, (count + kStride - 1) / kStride * kStride);
  }

  template <class From>
  void add(const From* x, int64_t count) {
    if (scaled_) {
      lanes_.template add<true>(x, count, base_, scale_);
    } else {
      lanes_.template add<false>(x, count, base_, scale_);
    }
  }

  void move_base(float to) {
    if (powers_ > 0.0) {
      const double by = double{base_} - to, factor = std::exp(by);
      weighted_ = factor * (weighted_ + by * powers_);
      powers_ *= factor;
      best_time_ *= std::exp(-by * scale_);
    }
    base_ = to;
  }

  const Logit* logits_;
  int64_t width_;
  bool sampling_, scaled_;
  float scale_, limit_;
  Lanes lanes_;
  float base_ = -kInfinity, highest_ = -kInfinity;
  int64_t highest_chunk_ = 0;
  double powers_ = 0.0, weighted_ = 0.0;  // sums of e^(x - base) and (x - base) e^(x - base)
  double best_time_ = std::numeric_limits<double>::infinity(), uniform_ = 0.0;
  int64_t drawn_chunk_ = 0;
};

}  // namespace

template <class Logit>
void row_stats(const RowStatsArguments<Logit>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t number = a.rows ? a.rows[n] : n;
    const float temperature = a.temperature ? a.temperature[n * a.temperature_step] : 0.0f;
    Row<Logit> row(a.logits + number * a.stride, a.width, temperature);
    row.read(a.seed, static_cast<uint64_t>(a.noise_rows ? a.noise_rows[n] : number));
    int64_t best = 0, token = 0;
    float log_prob = -kInfinity, margin = 0.0f, entropy = 0.0f;
    if (row.possible()) {
      best = token = row.best();
      double above = 0.0;  // the chosen logit, from the highest
      if (temperature > 0.0f) {
        token = row.draw();
        above = double{row.logit(token)} - row.highest();
      }
      log_prob = static_cast<float>(above - row.log_sum());
      margin = static_cast<float>(row.margin());
      entropy = static_cast<float>(row.entropy());
    }
    a.token[n] = token;
    a.log_prob[n] = log_prob;
    a.margin[n] = margin;
    a.entropy[n] = entropy;
    if (a.best) a.best[n] = best;
  }
}

template void row_stats<float>(const RowStatsArguments<float>&, int64_t, int64_t);
template void row_stats<double>(const RowStatsArguments<double>&, int64_t, int64_t);
template void row_stats<simd::BFloat16>(const RowStatsArguments<simd::BFloat16>&, int64_t, int64_t);
template void row_stats<simd::Half>(const RowStatsArguments<simd::Half>&, int64_t, int64_t);

}  // namespace condgen_fast::refinement::CONDGEN_FAST_ISA
