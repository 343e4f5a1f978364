// The CPU kernels against whole matrices, and the CUDA kernels, emulated, against the CPU kernels.
#include "levenshtein/levenshtein.h"

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "testing.h"
#include "warp_emulation.h"
// after the emulation
#include "levenshtein/warp_kernels.cuh"

namespace condgen_fast::levenshtein {
namespace {

uint32_t shared[1 << 16];  // the shared memory of the kernels

constexpr int64_t kPad = 0, kBos = 1, kEos = 2, kMask = 3;

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t bound) { return static_cast<int64_t>(random() % static_cast<uint64_t>(bound)); }

template <class Id>
struct Pairs {
  int64_t rows, width, target_width;
  std::vector<Id> tokens, target;  // bos ... eos, padded
};

// Every other row of tokens is an edited copy of its target.
template <class Id>
Pairs<Id> random_pairs(Random& random, int64_t rows, int64_t width, int64_t target_width, int64_t alphabet) {
  Pairs<Id> pairs{rows, width, target_width, std::vector<Id>(rows * width, kPad), std::vector<Id>(rows * target_width)};
  std::fill(pairs.target.begin(), pairs.target.end(), static_cast<Id>(kPad));
  for (int64_t b = 0; b < rows; ++b) {
    Id* x = pairs.tokens.data() + b * width;
    Id* y = pairs.target.data() + b * target_width;
    const int64_t n = 2 + below(random, target_width - 1);
    for (int64_t j = 0; j < n; ++j) y[j] = static_cast<Id>(10 + below(random, alphabet));
    y[0] = kBos, y[n - 1] = kEos;
    int64_t m = 1;
    x[0] = kBos;
    const int64_t longest = 1 + below(random, width - 1);
    for (int64_t j = 1; j < n - 1 && m < longest; ++j) {
      if (below(random, 10) < 2) continue;
      x[m++] = b % 2 == 0 && below(random, 10) > 1 ? y[j] : static_cast<Id>(10 + below(random, alphabet));
    }
    x[m] = kEos;
  }
  return pairs;
}

// std::vector<bool> has no bool*.
using Bools = std::unique_ptr<bool[]>;

template <class Id>
struct Labels {
  explicit Labels(const Pairs<Id>& pairs)
      : pairs(pairs),
        delete_labels(new bool[pairs.rows * pairs.width]),
        masked(new bool[pairs.rows * pairs.target_width]),
        insert(pairs.rows * (pairs.width - 1), -1),
        distance(pairs.rows, -1) {}

  OracleArguments<Id> arguments(bool source_slots) {
    return {pairs.tokens.data(), pairs.target.data(), pairs.width,   pairs.target_width, kPad,
            source_slots,        delete_labels.get(), insert.data(), masked.get(),       distance.data()};
  }
  bool operator==(const Labels& other) const {
    return std::equal(delete_labels.get(), delete_labels.get() + pairs.rows * pairs.width, other.delete_labels.get()) &&
           std::equal(masked.get(), masked.get() + pairs.rows * pairs.target_width, other.masked.get()) &&
           insert == other.insert && distance == other.distance;
  }

  const Pairs<Id>& pairs;
  Bools delete_labels, masked;
  std::vector<int64_t> insert, distance;
};

// "insert, else delete, else keep" from the end, on the matrix of distances.
template <class Id>
void label_by_matrix(Labels<Id>& labels, bool source_slots) {
  const Pairs<Id>& pairs = labels.pairs;
  std::fill_n(labels.delete_labels.get(), pairs.rows * pairs.width, false);
  std::fill_n(labels.masked.get(), pairs.rows * pairs.target_width, false);
  std::fill(labels.insert.begin(), labels.insert.end(), 0);
  for (int64_t b = 0; b < pairs.rows; ++b) {
    const Id* x = pairs.tokens.data() + b * pairs.width;
    const Id* y = pairs.target.data() + b * pairs.target_width;
    const int64_t m = std::find(x, x + pairs.width, kPad) - x, n = std::find(y, y + pairs.target_width, kPad) - y;
    std::vector<std::vector<int64_t>> d(m + 1, std::vector<int64_t>(n + 1));
    for (int64_t i = 0; i <= m; ++i) {
      for (int64_t j = 0; j <= n; ++j) {
        if (i == 0 || j == 0) {
          d[i][j] = i + j;
        } else {
          d[i][j] = x[i - 1] == y[j - 1] ? d[i - 1][j - 1] : 1 + std::min(d[i - 1][j], d[i][j - 1]);
        }
      }
    }
    labels.distance[b] = d[m][n];
    int64_t kept = (m + n - d[m][n]) / 2;
    for (int64_t i = m, j = n; i > 0 || j > 0;) {
      if (j > 0 && d[i][j - 1] < d[i][j]) {
        ++labels.insert[b * (pairs.width - 1) + (source_slots ? i : kept) - 1];
        labels.masked[b * pairs.target_width + --j] = true;
      } else if (i > 0 && d[i - 1][j] < d[i][j]) {
        labels.delete_labels[b * pairs.width + --i] = true;
      } else {
        --i, --j, --kept;
      }
    }
  }
}

template <class Id>
std::vector<int64_t> warp_distance(const DistanceArguments<Id>& arguments, int64_t rows,
                                   std::vector<uint32_t>* scratch) {
  std::vector<int64_t> distance(rows, -1);
  DistanceArguments<Id> emulated = arguments;
  emulated.distance = distance.data();
  const int64_t words = 2 * ((arguments.other_width + 31) / 32);
  if (scratch != nullptr) scratch->assign(rows * words, 0xDEADBEEF);
  warp_emulation::launch(
      rows, [&] { edit_distance_kernel(emulated, scratch == nullptr ? nullptr : scratch->data(), words); });
  return distance;
}

template <class Id>
void compare(int64_t rows, int64_t width, int64_t target_width, int64_t alphabet, bool in_scratch) {
  Random random(width * 1000 + target_width * 10 + alphabet);
  const auto pairs = random_pairs<Id>(random, rows, width, target_width, alphabet);
  std::vector<uint32_t> scratch;
  Labels<Id> labels(pairs), wanted(pairs), emulated(pairs);
  for (bool source_slots : {false, true}) {
    const auto arguments = labels.arguments(source_slots);
    const BadRows bad = CONDGEN_FAST_CPU_CALL(edit_oracle, arguments, 0, rows);
    CHECK(bad.padded_first == kNoRow && bad.padded_second == kNoRow && bad.other == kNoRow);
    label_by_matrix(wanted, source_slots);
    CHECK(labels == wanted);

    const int64_t words = (width + 1) * ((target_width + 31) / 32);
    if (in_scratch) scratch.assign(rows * words, 0xDEADBEEF);
    const auto emulated_arguments = emulated.arguments(source_slots);
    warp_emulation::launch(
        rows, [&] { edit_oracle_kernel(emulated_arguments, in_scratch ? scratch.data() : nullptr, words); });
    CHECK(emulated == wanted);
  }
  for (bool substitution : {false, true}) {
    std::vector<int64_t> distance(rows, -1);
    const DistanceArguments<Id> arguments{pairs.tokens.data(), pairs.target.data(), width, target_width, kPad,
                                          substitution,        distance.data()};
    (void)CONDGEN_FAST_CPU_CALL(edit_distance, arguments, 0, rows);
    CHECK(substitution || distance == wanted.distance);
    CHECK(warp_distance(arguments, rows, in_scratch ? &scratch : nullptr) == distance);
  }
}

void compare_apply_edits(int64_t rows, int64_t width, int64_t out_width, int64_t seed) {
  using Id = int64_t;
  Random random(seed);
  const auto pairs = random_pairs<Id>(random, rows, width, width, 4);
  Bools deleted(new bool[rows * width]);
  std::generate_n(deleted.get(), rows * width, [&] { return below(random, 3) == 0; });
  std::vector<int64_t> counts(rows * (width - 1));
  std::generate(counts.begin(), counts.end(), [&] { return below(random, 4) == 0 ? below(random, 5) : 0; });
  std::vector<Id> fill(rows * out_width);
  std::generate(fill.begin(), fill.end(), [&] { return 100 + below(random, 50); });
  std::vector<uint16_t> scores(rows * width);
  std::generate(scores.begin(), scores.end(), [&] { return static_cast<uint16_t>(below(random, 1 << 16)); });

  struct Result {
    std::vector<Id> tokens;
    std::vector<uint16_t> scores;
    std::vector<int64_t> lengths, origin;
    bool operator==(const Result&) const = default;
  };
  auto empty = [&] {
    return Result{std::vector<Id>(rows * out_width, -7), std::vector<uint16_t>(rows * out_width, 7),
                  std::vector<int64_t>(rows, -7), std::vector<int64_t>(rows * out_width, -7)};
  };
  for (int parts = 0; parts < 8; ++parts) {
    auto arguments = [&](Result& result) {
      return ApplyArguments<Id, uint16_t>{pairs.tokens.data(),
                                          parts & 1 ? deleted.get() : nullptr,
                                          parts & 2 ? counts.data() : nullptr,
                                          parts & 4 ? fill.data() : nullptr,
                                          scores.data(),
                                          width,
                                          out_width,
                                          kPad,
                                          kBos,
                                          kEos,
                                          kMask,
                                          result.tokens.data(),
                                          result.scores.data(),
                                          result.lengths.data(),
                                          result.origin.data()};
    };
    Result wanted = empty(), emulated = empty();
    const auto cpu = arguments(wanted), warp = arguments(emulated);
    (void)CONDGEN_FAST_CPU_CALL(apply_edits, cpu, 0, rows);
    warp_emulation::launch(rows, [&] { apply_edits_kernel(warp); });
    CHECK(emulated == wanted);
  }
}

TEST(levenshtein_kernels_agree) {
  for (int64_t alphabet : {1, 3, 50}) {
    for (int64_t width : {2, 31, 33, 70, 129}) {
      for (int64_t target_width : {2, 32, 65, 100}) {
        compare<int64_t>(4, width, target_width, alphabet, alphabet == 3);
      }
    }
  }
}

TEST(levenshtein_kernels_agree_on_long_sentences) {
  compare<int32_t>(2, 60, 1100, 5, false);
  compare<int64_t>(2, 40, 2100, 4000, true);
  compare<int64_t>(2, 300, 1500, 3, true);
  compare<int64_t>(1, 900, 700, 40, true);
}

TEST(apply_edits_kernels_agree) {
  for (int64_t width : {2, 5, 32, 33, 90}) {
    for (int64_t out_width : {1, 2, 31, 64, 150}) compare_apply_edits(5, width, out_width, width * 1000 + out_width);
  }
}

}  // namespace
}  // namespace condgen_fast::levenshtein
