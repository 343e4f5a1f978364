#include "refinement/refinement.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "refinement/gumbel.h"
#include "refinement/ranking.h"

namespace condgen_fast::refinement::CONDGEN_FAST_ISA {
namespace {

using simd::kLanes;
using simd::Vec;

constexpr int64_t kChunk = 1024;  // logits that are read twice, the second time from the first-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kLowestExponent = -87.0f;  // below it e^x counts as 1.6e-38, which no sum of 1 or more feels

// e^x within 2.5e-7 of it, relatively, for kLowestExponent <= x <= 0; half the work of simd::exp, which takes any x.
// 2^f for |f| <= 1/2 by a minimax polynomial.
Vec exp_of_negative(Vec x) {
  const Vec shift(0x1.8p23f);  // adding it rounds to an integer, which is then in the low bits
  const Vec shifted = simd::fma(x, Vec(1.44269504088896341f), shift);
  const Vec f = simd::fma(x, Vec(1.44269504088896341f), shift - shifted);
  Vec p(1.32647273e-3f);
  p = simd::fma(p, f, Vec(9.67151299e-3f));
  p = simd::fma(p, f, Vec(5.55073358e-2f));
  p = simd::fma(p, f, Vec(2.40222424e-1f));
  p = simd::fma(p, f, Vec(6.93147004e-1f));
  p = simd::fma(p, f, Vec(1.0f));
  return reinterpret_cast<simd::Floats>(reinterpret_cast<simd::Ints>(p.raw) +
                                        (reinterpret_cast<simd::Ints>(shifted.raw) << 23));
}

float defined(float x) { return x != x ? -kInfinity : std::min(x, kLargest); }

// The highest and the second-highest value so far; of equal highest ones the token is the lowest.
struct TopTwo {
  float highest = -kInfinity, second = -kInfinity;
  int64_t token = 0;

  void look_at(const float* x, int64_t count, int64_t first_token) {
    for (int64_t i = 0; i < count; ++i) {
      if (!(x[i] > second)) continue;
      if (x[i] > highest) {
        second = highest;
        highest = x[i];
        token = first_token + i;
      } else {
        second = x[i];
      }
    }
  }
};

// Sums of exp(x - highest) and (x - highest) * exp(x - highest) over the logits so far.
struct Sums {
  double powers = 0.0, weighted = 0.0;

  void move(float from, float to) {  // to another highest
    if (from == to || powers == 0.0) return;
    const double by = static_cast<double>(from) - to, factor = std::exp(by);
    weighted = factor * (weighted + by * powers);
    powers *= factor;
  }

  // kChunk logits; `ahead` is what memory is asked for meanwhile, kChunk logits as they come. The processor's own
  // prefetching pauses where a chunk is read for the second time.
  template <class Logit>
  void add(const float* x, float highest, const Logit* ahead) {
    const Vec subtracted(highest), lowest(kLowestExponent);
    // Four of each, in variables of their own: GCC 12 keeps an array of them in memory.
    Vec power0(0.0f), power1(0.0f), power2(0.0f), power3(0.0f);
    Vec weighted0(0.0f), weighted1(0.0f), weighted2(0.0f), weighted3(0.0f);
    const auto add_one = [&](const float* from, Vec& power_sum, Vec& weighted_sum) {
      // max also makes NaN and -inf numbers, which the product needs
      const Vec exponent = simd::max(simd::load(from) - subtracted, lowest), power = exp_of_negative(exponent);
      power_sum = power_sum + power;
      weighted_sum = simd::fma(power, exponent, weighted_sum);
    };
    constexpr int64_t kLine = 64 / sizeof(Logit);
    for (int64_t i = 0; i < kChunk; i += 4 * kLanes) {
      for (int64_t line = 0; line < 4 * kLanes; line += kLine) __builtin_prefetch(ahead + i + line);
      add_one(x + i, power0, weighted0);
      add_one(x + i + kLanes, power1, weighted1);
      add_one(x + i + 2 * kLanes, power2, weighted2);
      add_one(x + i + 3 * kLanes, power3, weighted3);
    }
    powers += simd::reduce_sum((power0 + power1) + (power2 + power3));
    weighted += simd::reduce_sum((weighted0 + weighted1) + (weighted2 + weighted3));
  }
};

// argmax of logit + temperature * noise, for which few logits' noise has to be known.
struct GumbelMax {
  double temperature;
  uint64_t seed, row;
  double best = -std::numeric_limits<double>::infinity();
  int64_t token = 0;
  float logit = -kInfinity;

  void look_at(const float* x, int64_t count, int64_t first_token, float highest) {
    if (highest == -kInfinity) return;
    constexpr int64_t kQuads = kChunk / 4;
    uint32_t words[kChunk];
    random_words(seed, row, static_cast<uint64_t>(first_token / 4), kQuads, words);
    uint64_t below = limit(highest);
    for (int64_t quad = 0; 4 * quad < count; quad += kLanes) {
      if (!any_below(words + quad, kQuads, below)) continue;
      const int64_t end = std::min(count, 4 * (quad + kLanes));
      for (int64_t i = 4 * quad; i < end; ++i) {  // in order, so that of equal keys the lower token stays
        const uint32_t word = words[i % 4 * kQuads + i / 4];
        if (word >= below) continue;
        const float value = defined(x[i]);
        if (value + temperature * gumbel_at_most(word) < best) continue;
        const double key = value + temperature * gumbel(word);
        if (!(key > best)) continue;
        best = key;
        token = first_token + i;
        logit = value;
        below = limit(highest);
      }
    }
  }

  // Whether one of the words of kLanes quads is; below is at least 1.
  static bool any_below(const uint32_t* words, int64_t step, uint64_t below) {
    simd::Words lowest, next;
    std::memcpy(&lowest, words, sizeof lowest);
    for (int64_t i = 1; i < 4; ++i) {
      std::memcpy(&next, words + i * step, sizeof next);
      lowest = next < lowest ? next : lowest;
    }
    return simd::any({lowest <= simd::Words{} + static_cast<uint32_t>(below - 1)});
  }

  // Words from here on cannot win for a logit of at most `highest`.
  uint64_t limit(float highest) const {
    return best == -std::numeric_limits<double>::infinity() ? kAllWords
                                                            : words_that_exceed((best - highest) / temperature);
  }
};

// The chunk as kChunk floats, -inf beyond `count`, +inf made finite: where it is, or in `buffer`.
template <class Logit>
const float* as_floats(const Logit* x, int64_t count, float* buffer) {
  if constexpr (std::is_same_v<Logit, float>) {
    if (count == kChunk) return x;
  }
  int64_t i = 0;
  if constexpr (!std::is_same_v<Logit, double>) {
    for (; i + kLanes <= count; i += kLanes) simd::store(buffer + i, simd::load(x + i));
  }
  for (; i < count; ++i) {
    if constexpr (std::is_same_v<Logit, double>) {
      buffer[i] = static_cast<float>(x[i]);
    } else {
      buffer[i] = simd::to_float(x[i]);
    }
  }
  std::fill(buffer + count, buffer + kChunk, -kInfinity);
  return buffer;
}

float highest_of(const float* x) {  // kChunk logits
  Vec a(-kInfinity), b(-kInfinity), c(-kInfinity), d(-kInfinity);
  for (int64_t i = 0; i < kChunk; i += 4 * kLanes) {
    a = simd::max(simd::load(x + i), a);
    b = simd::max(simd::load(x + i + kLanes), b);
    c = simd::max(simd::load(x + i + 2 * kLanes), c);
    d = simd::max(simd::load(x + i + 3 * kLanes), d);
  }
  return simd::reduce_max(simd::max(simd::max(a, b), simd::max(c, d)));
}

// A position and what it is chosen by: the lower goes first, then the lower position.
using Candidate = uint64_t;

template <class Key>
void collect(const bool* maskable, int64_t width, const Key& key, std::vector<Candidate>& candidates) {
  candidates.clear();
  for (int64_t i = 0; i < width; ++i) {
    if (maskable[i]) candidates.push_back(Candidate{key(i)} << 32 | static_cast<uint32_t>(i));
  }
}

// chosen is all false before.
void choose(std::vector<Candidate>& candidates, int64_t count, bool* chosen) {
  const int64_t all = static_cast<int64_t>(candidates.size());
  count = std::clamp<int64_t>(count, 0, all);
  if (count < all) std::nth_element(candidates.begin(), candidates.begin() + count, candidates.end());
  for (int64_t i = 0; i < count; ++i) chosen[static_cast<uint32_t>(candidates[i])] = true;
}

}  // namespace

template <class Logit>
void row_stats(const RowStatsArguments<Logit>& a, int64_t begin, int64_t end) {
  float buffer[kChunk];
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = a.rows ? a.rows[n] : n;
    const Logit* logits = a.logits + row * a.stride;
    const float temperature = a.temperature ? a.temperature[n * a.temperature_step] : 0.0f;
    const bool sampling = temperature > 0.0f;
    TopTwo top;
    Sums sums;
    GumbelMax sample{temperature, a.seed, static_cast<uint64_t>(a.noise_rows ? a.noise_rows[n] : row)};
    for (int64_t first = 0; first < a.width; first += kChunk) {
      const int64_t count = std::min(kChunk, a.width - first);
      const float* x = as_floats(logits + first, count, buffer);
      float highest = highest_of(x);
      if (highest > kLargest) {
        for (int64_t i = 0; i < kChunk; ++i) buffer[i] = defined(x[i]);
        x = buffer;
        highest = kLargest;
      }
      if (highest > top.second) {
        const float before = top.highest;
        top.look_at(x, count, first);
        sums.move(before, top.highest);
      }
      if (highest > -kInfinity) sums.add(x, top.highest, logits + first + kChunk);
      if (sampling) sample.look_at(x, count, first, highest);
    }
    if (top.highest == -kInfinity) {
      a.token[n] = 0;
      a.log_prob[n] = -kInfinity;
      a.margin[n] = a.entropy[n] = 0.0f;
      continue;
    }
    const double log_sum = std::log(sums.powers);
    a.token[n] = sampling ? sample.token : top.token;
    a.log_prob[n] = static_cast<float>((sampling ? static_cast<double>(sample.logit) - top.highest : 0.0) - log_sum);
    a.margin[n] = static_cast<float>(-std::expm1(static_cast<double>(top.second) - top.highest) / sums.powers);
    a.entropy[n] = static_cast<float>(std::max(0.0, log_sum - sums.weighted / sums.powers));
  }
}

void remask(const RemaskArguments& a, int64_t begin, int64_t end) {
  std::vector<Candidate> candidates;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * a.width;
    collect(a.maskable + first, a.width, [&](int64_t i) { return lowest_first(a.scores[first + i]); }, candidates);
    std::fill_n(a.masked + first, a.width, false);
    choose(candidates, a.count[b], a.masked + first);
  }
}

template <class Canvas>
void commit(const CommitArguments<Canvas>& a, int64_t begin, int64_t end) {
  std::vector<Candidate> candidates;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * a.width;
    const float* ranking = a.ranking + first;
    const bool entropy = a.policy == Policy::kEntropy;
    std::fill_n(a.committed + first, a.width, false);
    if (a.active == nullptr || a.active[b]) {
      const auto key = [&](int64_t i) { return entropy ? surest_first(ranking[i]) : highest_first(ranking[i]); };
      collect(a.maskable + first, a.width, key, candidates);
      int64_t allowed = 0;
      if (a.policy == Policy::kAtLeast) {
        allowed = std::count_if(candidates.begin(), candidates.end(), [&](Candidate candidate) {
          return reaches(ranking[static_cast<uint32_t>(candidate)], a.bound[b]);
        });
      } else if (entropy) {
        std::sort(candidates.begin(), candidates.end());
        int64_t units = 0;
        for (Candidate candidate : candidates) {
          if (!fits(units, a.bound[b])) break;
          units += entropy_units(ranking[static_cast<uint32_t>(candidate)]);
          ++allowed;
        }
      }
      choose(candidates, std::max(allowed, a.minimum[b]), a.committed + first);
    }
    for (int64_t i = first; i < first + a.width; ++i) {
      a.out[i] = a.committed[i] ? static_cast<Canvas>(a.token[i]) : a.canvas[i];
    }
  }
}

template void row_stats<float>(const RowStatsArguments<float>&, int64_t, int64_t);
template void row_stats<double>(const RowStatsArguments<double>&, int64_t, int64_t);
template void row_stats<simd::BFloat16>(const RowStatsArguments<simd::BFloat16>&, int64_t, int64_t);
template void row_stats<simd::Half>(const RowStatsArguments<simd::Half>&, int64_t, int64_t);
template void commit<int32_t>(const CommitArguments<int32_t>&, int64_t, int64_t);
template void commit<int64_t>(const CommitArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::refinement::CONDGEN_FAST_ISA
