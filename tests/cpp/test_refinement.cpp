// The CPU kernels of the refinement family against sorts and loops in double precision.
#include "refinement/refinement.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "refinement/noise.h"
#include "testing.h"

namespace condgen_fast::refinement {
namespace {

constexpr float kInfinity = INFINITY;

struct Stats {
  std::vector<int64_t> token;
  std::vector<float> log_prob, margin, entropy;
  std::vector<int64_t> best;
};

Stats stats_of(const std::vector<float>& logits, int64_t width, const std::vector<float>& temperature, uint64_t seed) {
  const int64_t count = static_cast<int64_t>(logits.size()) / width;
  Stats stats{std::vector<int64_t>(count), std::vector<float>(count), std::vector<float>(count),
              std::vector<float>(count), std::vector<int64_t>(count)};
  RowStatsArguments<float> arguments{};
  arguments.logits = logits.data();
  arguments.stride = arguments.width = width;
  arguments.temperature = temperature.empty() ? nullptr : temperature.data();
  arguments.seed = seed;
  arguments.token = stats.token.data();
  arguments.log_prob = stats.log_prob.data();
  arguments.margin = stats.margin.data();
  arguments.entropy = stats.entropy.data();
  arguments.best = stats.best.data();
  CONDGEN_FAST_CPU_CALL(row_stats, arguments, 0, count);
  return stats;
}

std::vector<float> random_row(int64_t width, float scale) {
  std::vector<float> row(width);
  for (float& x : row) x = testing::random_int(0, 9) == 0 ? -kInfinity : scale * testing::random_normal();
  row[testing::random_int(0, width - 1)] = 0.0f;
  return row;
}

TEST(refinement_row_stats_is_the_definition) {
  for (int64_t width : {1, 2, 3, 17, 63, 64, 65, 1025, 2047, 2048, 2049, 4096, 5000}) {
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

TEST(refinement_chunk_noise_is_philox) {  // kat_vectors of Random123 1.09, philox4x32 with 10 rounds, the first words
  struct Case {
    uint64_t seed, row, chunk;
    uint32_t words[3];
  };
  for (const Case& known :
       {Case{0, 0, 0, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C}},
        Case{~0ull, ~0ull, ~0ull, {0x408F276D, 0x41C83B0E, 0xA20BC7C6}},
        Case{0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88, {0xD16CFE09, 0x94FDCCEB, 0x5001E420}}}) {
    const ChunkNoise noise = chunk_noise(known.seed, known.row, known.chunk);
    CHECK_NEAR(noise.exponential, -std::log(1 - ((known.words[0] >> 9) + 0.5) / 8388608.0), 1e-12);
    CHECK_NEAR(noise.uniform, (known.words[1] * 4294967296.0 + known.words[2]) * 0x1p-64, 1e-15);
  }
}

// In each row the chunk of the smallest exponential / sum of powers, and in it the column where their sum passes.
TEST(refinement_row_stats_draws_by_chunks) {
  for (int64_t width : {1, 3, 64, 1026, 2048, 2049, 9000}) {
    for (float temperature : {1e-30f, 0.1f, 1.0f, 30.0f, 1e30f}) {
      std::vector<float> logits;
      for (int64_t row = 0; row < 8; ++row) {
        const std::vector<float> next = random_row(width, row < 4 ? 3.0f : 0.0f);
        logits.insert(logits.end(), next.begin(), next.end());
      }
      const uint64_t seed = static_cast<uint64_t>(testing::random_int(0, INT64_MAX));
      const Stats got = stats_of(logits, width, {temperature}, seed);
      for (int64_t row = 0; row < 8; ++row) {
        const float* x = logits.data() + row * width;
        const float highest = *std::max_element(x, x + width);
        const auto power = [&](int64_t i) { return std::exp((static_cast<double>(x[i]) - highest) / temperature); };
        double best = kInfinity, passed = 0.0, sum_of_best = 1.0;
        int64_t first = 0;
        for (int64_t chunk = 0; chunk * kChunk < width; ++chunk) {
          double sum = 0.0;
          for (int64_t i = chunk * kChunk; i < std::min(width, (chunk + 1) * kChunk); ++i) sum += power(i);
          const ChunkNoise noise = chunk_noise(seed, row, chunk);
          if (!(noise.exponential / sum < best)) continue;
          best = noise.exponential / sum;
          first = chunk * kChunk;
          passed = noise.uniform * sum;
          sum_of_best = sum;
        }
        double before = 0.0;  // of the token drawn, within the slack that float32 sums take
        for (int64_t i = first; i < got.token[row]; ++i) before += power(i);
        CHECK(got.token[row] >= first && got.token[row] < first + kChunk && power(got.token[row]) > 0.0);
        CHECK(before <= passed + 1e-6 * sum_of_best);
        CHECK(before + power(got.token[row]) >= passed - 1e-6 * sum_of_best);
        CHECK(got.best[row] == std::max_element(x, x + width) - x);
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
    if (trial % 2 == 0) {
      arguments.minimum = &minimum;
      arguments.bound = &bound;
    } else {
      arguments.least = minimum;
      arguments.limit = bound;
    }
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
