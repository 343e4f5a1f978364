// The CPU kernels of the refinement family against sorts and loops in double precision.
#include "refinement/refinement.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "testing.h"

namespace condgen_fast::refinement {
namespace {

constexpr float kInfinity = INFINITY;

struct Stats {
  std::vector<int64_t> token;
  std::vector<float> log_prob, margin, entropy;
};

Stats stats_of(const std::vector<float>& logits, int64_t width, const std::vector<float>& temperature, uint64_t seed) {
  const int64_t count = static_cast<int64_t>(logits.size()) / width;
  Stats stats{std::vector<int64_t>(count), std::vector<float>(count), std::vector<float>(count),
              std::vector<float>(count)};
  RowStatsArguments<float> arguments{};
  arguments.logits = logits.data();
  arguments.stride = arguments.width = width;
  arguments.temperature = temperature.empty() ? nullptr : temperature.data();
  arguments.seed = seed;
  arguments.token = stats.token.data();
  arguments.log_prob = stats.log_prob.data();
  arguments.margin = stats.margin.data();
  arguments.entropy = stats.entropy.data();
  CONDGEN_FAST_CPU_CALL(row_stats, arguments, 0, count);
  return stats;
}

// Philox4x32-10 and the noise made of it, as reference.py defines them.
double noise(uint64_t seed, uint64_t row, uint64_t column) {
  uint32_t c[4] = {static_cast<uint32_t>(column / 4), static_cast<uint32_t>(column / 4 >> 32),
                   static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  const uint32_t word = c[column % 4];
  const double fine = (word + 0.5) / 4294967296.0, coarse = ((word >> 9) + 0.5) / 8388608.0;
  return -std::log(word < (1u << 20) ? fine + fine * fine / 2 : -std::log(1 - coarse));
}

std::vector<float> random_row(int64_t width, float scale) {
  std::vector<float> row(width);
  for (float& x : row) x = testing::random_int(0, 9) == 0 ? -kInfinity : scale * testing::random_normal();
  row[testing::random_int(0, width - 1)] = 0.0f;
  return row;
}

TEST(refinement_row_stats_is_the_definition) {
  for (int64_t width : {1, 2, 3, 17, 63, 64, 65, 1023, 1024, 1025, 4096, 5000}) {
    for (float scale : {0.01f, 1.0f, 20.0f, 3000.0f}) {
      std::vector<float> row = random_row(width, scale);
      if (scale >= 1.0f) row[testing::random_int(0, width - 1)] = *std::max_element(row.begin(), row.end());  // a tie
      const Stats got = stats_of(row, width, {}, 0);
      const int64_t token = std::max_element(row.begin(), row.end()) - row.begin();
      double sum = 0.0, weighted = 0.0, second = 0.0;
      for (int64_t i = 0; i < width; ++i) {
        const double power = std::exp(static_cast<double>(row[i]) - row[token]);
        sum += power;
        if (power > 0.0) weighted += power * (static_cast<double>(row[i]) - row[token]);
        if (i != token) second = std::max(second, power);
      }
      CHECK(got.token[0] == token);
      CHECK_NEAR(got.log_prob[0], -std::log(sum), 2e-6);
      CHECK_NEAR(got.margin[0], (1 - second) / sum, 1e-6);
      CHECK_NEAR(got.entropy[0], std::log(sum) - weighted / sum, 3e-6);
    }
  }
}

// Few logits' noise is computed; this computes all.
TEST(refinement_row_stats_draws_the_highest_noisy_logit) {
  for (int64_t width : {1, 3, 64, 1024, 1026, 3001}) {
    for (float temperature : {1e-30f, 0.1f, 1.0f, 30.0f, 1e30f}) {
      std::vector<float> logits;
      for (int64_t row = 0; row < 8; ++row) {
        const std::vector<float> next = random_row(width, row < 4 ? 3.0f : 0.0f);
        logits.insert(logits.end(), next.begin(), next.end());
      }
      const uint64_t seed = static_cast<uint64_t>(testing::random_int(0, INT64_MAX));
      const Stats got = stats_of(logits, width, {temperature}, seed);
      for (int64_t row = 0; row < 8; ++row) {
        double best = -kInfinity;
        int64_t token = 0;
        for (int64_t i = 0; i < width; ++i) {
          const double key = logits[row * width + i] + double{temperature} * noise(seed, row, i);
          if (key > best) {
            best = key;
            token = i;
          }
        }
        CHECK(got.token[row] == token);
      }
    }
  }
}

std::vector<float> random_ranking(int64_t width) {
  std::vector<float> ranking(width);
  for (float& x : ranking) {
    const int64_t kind = testing::random_int(0, 9);
    x = kind == 0   ? NAN
        : kind == 1 ? -kInfinity
        : kind == 2 ? kInfinity
        : kind == 3 ? -0.0f
                    : testing::random_int(-6, 6) / 4.0f;
  }
  return ranking;
}

// The maskable positions by ascending value, ties and NaN (as `nan`) by position.
std::vector<int64_t> ascending(std::vector<float> values, const bool* maskable, float nan) {
  std::vector<int64_t> order;
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) values[i] = nan;
    if (maskable[i]) order.push_back(static_cast<int64_t>(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return values[a] < values[b]; });
  return order;
}

std::vector<bool> first_of(const std::vector<int64_t>& order, int64_t count, int64_t width) {
  std::vector<bool> chosen(width, false);
  for (int64_t i = 0; i < std::min<int64_t>(count, static_cast<int64_t>(order.size())); ++i) chosen[order[i]] = true;
  return chosen;
}

std::unique_ptr<bool[]> random_flags(int64_t width) {
  auto flags = std::make_unique<bool[]>(width);
  for (int64_t i = 0; i < width; ++i) flags[i] = testing::random_int(0, 3) > 0;
  return flags;
}

TEST(refinement_remask_takes_the_lowest) {
  for (int trial = 0; trial < 500; ++trial) {
    const int64_t width = testing::random_int(1, trial < 400 ? 20 : 600);
    const std::vector<float> scores = random_ranking(width);
    const auto maskable = random_flags(width), masked = random_flags(width);
    const int64_t count = testing::random_int(-2, width + 2);
    CONDGEN_FAST_CPU_CALL(remask, RemaskArguments{scores.data(), &count, maskable.get(), width, masked.get()}, 0, 1);
    const auto wanted = first_of(ascending(scores, maskable.get(), -kInfinity), count, width);
    for (int64_t i = 0; i < width; ++i) CHECK(masked[i] == wanted[i]);
  }
}

TEST(refinement_commit_takes_the_surest) {
  for (int trial = 0; trial < 900; ++trial) {
    const int64_t width = testing::random_int(1, trial < 800 ? 20 : 600);
    const Policy policy = static_cast<Policy>(trial % 3);
    std::vector<float> ranking = random_ranking(width);
    std::vector<int64_t> token(width);
    std::vector<int32_t> canvas(width, -1), out(width);
    std::iota(token.begin(), token.end(), 0);
    const auto maskable = random_flags(width), committed = random_flags(width);
    const int64_t minimum = testing::random_int(-2, width + 2);
    const float bound = testing::random_int(-3, 12) / 2.0f;
    CommitArguments<int32_t> arguments{};
    arguments.token = token.data();
    arguments.ranking = ranking.data();
    arguments.canvas = canvas.data();
    arguments.maskable = maskable.get();
    arguments.minimum = &minimum;
    arguments.bound = &bound;
    arguments.width = width;
    arguments.policy = policy;
    arguments.out = out.data();
    arguments.committed = committed.get();
    CONDGEN_FAST_CPU_CALL(commit, arguments, 0, 1);

    std::vector<float> cost = ranking;
    if (policy != Policy::kEntropy) std::transform(cost.begin(), cost.end(), cost.begin(), std::negate<>());
    const std::vector<int64_t> order = ascending(cost, maskable.get(), kInfinity);
    int64_t count = 0;
    if (policy == Policy::kAtLeast) {
      for (int64_t i : order) count += ranking[i] >= bound;
    } else if (policy == Policy::kEntropy) {
      double sum = 0.0;  // exact: all are quarters
      for (int64_t i : order) {
        if (sum > bound) break;
        sum += std::isnan(cost[i]) ? 64.0 : std::clamp(cost[i], 0.0f, 64.0f);
        ++count;
      }
    }
    const auto wanted = first_of(order, std::max(count, minimum), width);
    for (int64_t i = 0; i < width; ++i) {
      CHECK(committed[i] == wanted[i]);
      CHECK(out[i] == (wanted[i] ? token[i] : -1));
    }
  }
}

}  // namespace
}  // namespace condgen_fast::refinement
