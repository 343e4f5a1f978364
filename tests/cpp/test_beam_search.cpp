// The CPU kernels of the beam_search family against a sort in double precision.
#include "beam_search/beam_search.h"

#include <algorithm>
#include <numeric>

#include "testing.h"

namespace condgen_fast::beam_search {
namespace {

constexpr float kInfinity = INFINITY;

struct Step {
  int64_t batch, beams, vocab, k;
  float temperature;
  std::vector<float> logits, scores;  // [B, K, V], [B, K]
};

struct Found {
  std::vector<float> scores;
  std::vector<int64_t> parents, tokens;

  bool operator==(const Found&) const = default;
};

// In two halves, the second first: no block and no sentence leans on another.
template <class Logit>
Found beam_topk(const Step& step, bool in_halves) {
  const std::vector<Logit> logits(step.logits.begin(), step.logits.end());
  Blocks blocks{};
  blocks.per_row = (step.vocab + kBlock - 1) / kBlock;
  const int64_t count = step.batch * step.beams * blocks.per_row;
  std::vector<float> columns(count * kColumns), highest(count);
  std::vector<double> sums(count), shifts(count);
  blocks.columns = columns.data();
  blocks.highest = highest.data();
  blocks.sums = sums.data();
  blocks.shifts = shifts.data();

  const int64_t places = step.batch * step.k;
  Found out{std::vector<float>(places), std::vector<int64_t>(places), std::vector<int64_t>(places)};
  Arguments<Logit> arguments{};
  arguments.logits = logits.data();
  arguments.sentence_stride = step.beams * step.vocab;
  arguments.beam_stride = step.vocab;
  arguments.scores = step.scores.data();
  arguments.beams = step.beams;
  arguments.vocab = step.vocab;
  arguments.k = step.k;
  arguments.temperature = step.temperature;
  arguments.power_scale = 1.44269504f / step.temperature;
  arguments.out_scores = out.scores.data();
  arguments.out_parents = out.parents.data();
  arguments.out_tokens = out.tokens.data();
  if (in_halves) {
    CONDGEN_FAST_CPU_CALL(sweep, arguments, blocks, 0, count / 2, count);
    CONDGEN_FAST_CPU_CALL(sweep, arguments, blocks, 0, 0, count / 2);
    CONDGEN_FAST_CPU_CALL(select, arguments, blocks, 0, step.batch / 2, step.batch);
    CONDGEN_FAST_CPU_CALL(select, arguments, blocks, 0, 0, step.batch / 2);
  } else {
    for (int64_t b = 0; b < step.batch; ++b) {
      const int64_t of_sentence = step.beams * blocks.per_row;
      CONDGEN_FAST_CPU_CALL(sweep, arguments, blocks, b * step.beams, b * of_sentence, (b + 1) * of_sentence);
      CONDGEN_FAST_CPU_CALL(select, arguments, blocks, b * step.beams, b, b + 1);
    }
  }
  return out;
}

struct Continuation {
  double total;
  int64_t parent, token;
};

// All K * V continuations of a sentence; within a parent in the order in which they are to be found.
std::vector<Continuation> continuations(const Step& step, int64_t sentence) {
  std::vector<Continuation> all;
  for (int64_t i = 0; i < step.beams; ++i) {
    std::vector<double> row(step.vocab);
    for (int64_t v = 0; v < step.vocab; ++v) {
      row[v] = step.logits[(sentence * step.beams + i) * step.vocab + v];
      if (std::isnan(row[v])) row[v] = -kInfinity;
    }
    const double top = *std::max_element(row.begin(), row.end()), score = step.scores[sentence * step.beams + i];
    const bool alive = std::isfinite(top) && std::isfinite(score);
    if (!alive) std::fill(row.begin(), row.end(), -kInfinity);
    double sum = 0;
    for (double x : row) sum += alive ? std::exp((x - top) / step.temperature) : 0;
    std::vector<int64_t> tokens(step.vocab);
    std::iota(tokens.begin(), tokens.end(), 0);
    std::stable_sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    for (int64_t v : tokens) {
      all.push_back({alive ? score + (row[v] - top) / step.temperature - std::log(sum) : -kInfinity, i, v});
    }
  }
  return all;
}

void check_against_sort(const Step& step, const Found& found) {
  for (int64_t b = 0; b < step.batch; ++b) {
    const std::vector<Continuation> all = continuations(step, b);
    std::vector<double> totals;
    for (const Continuation& each : all) totals.push_back(each.total);
    std::sort(totals.begin(), totals.end(), std::greater<>());
    std::vector<int64_t> taken(step.beams);
    for (int64_t place = 0; place < step.k; ++place) {
      const float score = found.scores[b * step.k + place];
      const int64_t parent = found.parents[b * step.k + place], token = found.tokens[b * step.k + place];
      if (place >= step.beams * step.vocab || totals[place] == -kInfinity) {
        CHECK(score == -kInfinity && parent == 0 && token == 0);
        continue;
      }
      const Continuation& expected = all[parent * step.vocab + taken[parent]++];
      CHECK(token == expected.token);
      CHECK_NEAR(score, expected.total, 1e-5);
      CHECK_NEAR(score, totals[place], 1e-5);
      const float before = place == 0 ? kInfinity : found.scores[b * step.k + place - 1];
      CHECK(score < before || (score == before && found.parents[b * step.k + place - 1] <= parent));
    }
  }
}

void check(const Step& step) {
  const Found found = beam_topk<float>(step, true);
  check_against_sort(step, found);
  CHECK(beam_topk<float>(step, false) == found);
  CHECK(beam_topk<double>(step, true) == found);
}

Step random_step(int64_t batch, int64_t beams, int64_t vocab, int64_t k, float temperature) {
  Step step{batch,
            beams,
            vocab,
            k,
            temperature,
            std::vector<float>(batch * beams * vocab),
            std::vector<float>(batch * beams)};
  for (float& x : step.logits) x = 3 * testing::random_normal();
  for (float& x : step.scores) x = 3 * testing::random_normal();
  return step;
}

}  // namespace

TEST(beam_topk_of_random_logits) {
  for (int64_t vocab : {1, 2, 15, 16, 17, 63, 64, 65, 1000, 1023, 1024, 4095, 4096, 4097, 9000}) {
    for (int64_t k : {1, 5, 64, 100}) check(random_step(2, 3, vocab, k, k == 5 ? 0.5f : 1.0f));
  }
}

// With one beam every candidate of the row counts, the last ones too.
TEST(beam_topk_of_one_beam) {
  for (int64_t k : {1, 10, 33, 64, 65, 200}) check(random_step(4, 1, 10000, k, 1.0f));
}

TEST(beam_topk_of_ties_and_special_values) {
  const float values[] = {-kInfinity, -kInfinity, NAN, 0.0f, -0.0f, 1.0f, 2.0f, -3.0f};
  for (int64_t vocab : {3, 70, 1100, 3000}) {
    for (int64_t k : {1, 4, 70, 3400}) {
      Step step = random_step(4, 3, vocab, k, 1.0f);
      for (float& x : step.logits) x = values[testing::random_int(0, 7)];
      step.logits[vocab - 1] = kInfinity;
      std::fill_n(step.logits.begin() + 4 * vocab, vocab, -kInfinity);
      std::fill_n(step.logits.begin() + 5 * vocab, vocab, NAN);
      step.scores[6] = -kInfinity;
      step.scores[7] = NAN;
      step.scores[8] = kInfinity;
      check(step);
    }
  }
}

TEST(beam_topk_of_sorted_logits) {
  for (bool ascending : {false, true}) {
    Step step = random_step(1, 2, 4000, 20, 1.0f);
    for (int64_t i = 0; i < 8000; ++i) step.logits[i] = (ascending ? 1.0f : -1.0f) * static_cast<float>(i % 4000) / 500;
    check(step);
  }
}

}  // namespace condgen_fast::beam_search
