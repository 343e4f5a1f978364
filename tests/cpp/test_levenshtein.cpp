// The CPU kernels against whole matrices, and the CUDA kernels, emulated, against the CPU kernels.
#include "levenshtein/levenshtein.h"

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "levenshtein_pairs.h"
#include "testing.h"
#include "warp_emulation.h"
// after the emulation
#include "levenshtein/apply_edits_kernel.cuh"
#include "levenshtein/edit_distance_kernels.cuh"
#include "levenshtein/edit_oracle_kernel.cuh"

namespace condgen_fast::levenshtein {
namespace {

uint32_t shared[1 << 16];  // the shared memory of the kernels

template <class Id>
std::vector<int64_t> warp_distance(const DistanceArguments<Id>& arguments, int64_t rows,
                                   std::vector<uint32_t>* scratch) {  // rows: pairs
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

    const int64_t words = oracle_words(width, target_width);
    if (in_scratch) scratch.assign(rows * words, 0xDEADBEEF);
    const auto emulated_arguments = emulated.arguments(source_slots);
    warp_emulation::launch(
        rows, [&] { edit_oracle_kernel(emulated_arguments, in_scratch ? scratch.data() : nullptr, words); });
    CHECK(emulated == wanted);
  }
  for (bool substitution : {false, true}) {
    std::vector<int64_t> distance(rows, -1);
    DistanceArguments<Id> arguments{pairs.tokens.data(), pairs.target.data(), width, target_width, 0, kPad,
                                    substitution,        distance.data()};
    (void)CONDGEN_FAST_CPU_CALL(edit_distance, arguments, 0, rows);
    CHECK(substitution || distance == wanted.distance);
    CHECK(warp_distance(arguments, rows, in_scratch ? &scratch : nullptr) == distance);

    std::vector<int64_t> all(rows * rows, -1);
    arguments.others = rows;
    arguments.distance = all.data();
    (void)CONDGEN_FAST_CPU_CALL(edit_distance, arguments, 0, rows * rows);
    for (int64_t b = 0; b < rows; ++b) CHECK(all[b * rows + b] == distance[b]);
    CHECK(warp_distance(arguments, rows * rows, in_scratch ? &scratch : nullptr) == all);
  }

  Alignment<Id> aligned(pairs), by_matrix(pairs), by_warp(pairs);
  const auto arguments = aligned.arguments();
  (void)CONDGEN_FAST_CPU_CALL(edit_alignment, arguments, 0, rows);
  align_by_matrix(by_matrix);
  CHECK(aligned == by_matrix);
  const int64_t words = alignment_words(width, target_width);
  if (in_scratch) scratch.assign(rows * words, 0xDEADBEEF);
  const auto warp_arguments = by_warp.arguments();
  warp_emulation::launch(rows,
                         [&] { edit_alignment_kernel(warp_arguments, in_scratch ? scratch.data() : nullptr, words); });
  CHECK(by_warp == by_matrix);
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
  std::vector<int64_t> bounds(rows);
  std::generate(bounds.begin(), bounds.end(), [&] { return below(random, 2 * width); });
  for (int parts = 0; parts < 16; ++parts) {
    auto arguments = [&](Result& result) {
      return ApplyArguments<Id, uint16_t>{pairs.tokens.data(),
                                          parts & 1 ? deleted.get() : nullptr,
                                          parts & 2 ? counts.data() : nullptr,
                                          parts & 4 ? fill.data() : nullptr,
                                          scores.data(),
                                          parts & 8 ? bounds.data() : nullptr,
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

// Labels, distances and alignments of all pairs against the matrices, which know nothing of bits.
template <class Id>
void check_pairs(const Pairs<Id>& pairs, bool with_alignment) {
  Labels<Id> labels(pairs), wanted(pairs);
  for (bool source_slots : {false, true}) {
    std::fill_n(labels.delete_labels.get(), pairs.rows * pairs.width, true);
    std::fill_n(labels.masked.get(), pairs.rows * pairs.target_width, true);
    const auto arguments = labels.arguments(source_slots);
    const BadRows bad = CONDGEN_FAST_CPU_CALL(edit_oracle, arguments, 0, pairs.rows);
    CHECK(bad.padded_first == kNoRow && bad.padded_second == kNoRow && bad.other == kNoRow);
    label_by_matrix(wanted, source_slots);
    CHECK(labels == wanted);
    for (int64_t b = 0; b < pairs.rows; ++b) CHECK(labels_give_target(labels, b, source_slots));
  }
  if (!with_alignment) return;
  Alignment<Id> aligned(pairs), by_matrix(pairs);
  const auto arguments = aligned.arguments();
  (void)CONDGEN_FAST_CPU_CALL(edit_alignment, arguments, 0, pairs.rows);
  align_by_matrix(by_matrix);
  CHECK(aligned == by_matrix);
  std::vector<int64_t> distance(pairs.rows, -1);
  for (bool substitution : {false, true}) {
    const DistanceArguments<Id> arguments{
        pairs.tokens.data(), pairs.target.data(), pairs.width, pairs.target_width, 0, kPad,
        substitution,        distance.data()};
    (void)CONDGEN_FAST_CPU_CALL(edit_distance, arguments, 0, pairs.rows);
    CHECK(distance == (substitution ? by_matrix.distance : wanted.distance));
  }
}

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kLongestWord = 4, kRandomPairs = 20'000;
#else
constexpr int64_t kLongestWord = 7, kRandomPairs = 1'000'000;
#endif

// 3280 words of at most seven letters, so 10,758,400 pairs, between bos and eos.
TEST(levenshtein_every_pair_of_short_words) {
  std::vector<std::vector<int64_t>> words{{}};
  for (size_t k = 0; k < words.size(); ++k) {
    if (static_cast<int64_t>(words[k].size()) == kLongestWord) break;
    for (int64_t letter : {10, 11, 12}) {
      words.push_back(words[k]);
      words.back().push_back(letter);
    }
  }
  const auto count = static_cast<int64_t>(words.size()), width = kLongestWord + 2;
  Pairs<int64_t> pairs{count, width, width, std::vector<int64_t>(count * width), std::vector<int64_t>(count * width)};
  auto write = [&](const std::vector<int64_t>& word, int64_t* row) {
    std::fill(row, row + width, kPad);
    row[0] = kBos;
    std::copy(word.begin(), word.end(), row + 1);
    row[word.size() + 1] = kEos;
  };
  for (int64_t b = 0; b < count; ++b) write(words[b], pairs.target.data() + b * width);
  for (const auto& word : words) {
    for (int64_t b = 0; b < count; ++b) write(word, pairs.tokens.data() + b * width);
    check_pairs(pairs, false);
  }
}

// The fuzz target: pairs of all kinds of lengths, alphabets and ids, the same in every run; CI also runs it under
// sanitizers.
TEST(levenshtein_random_pairs) {
  Random random(4);
  auto check = [&](auto id) {
    using Id = decltype(id);
    const int64_t kind = below(random, 40);
    const int64_t most = kind < 30 ? 24 : kind < 36 ? 70 : kind < 39 ? 140 : 300;
    const int64_t rows = std::max<int64_t>(1, 4000 / (most * most) * 8 + below(random, 9));
    const int64_t alphabet = std::vector<int64_t>{1, 2, 3, 10, 1000}[below(random, 5)];
    Pairs<Id> pairs = random_pairs<Id>(random, rows, 2 + below(random, most), 2 + below(random, most), alphabet);
    const int64_t spread = below(random, 4);  // ids of 16, 32 and 64 bits, and negative ones
    for (auto* side : {&pairs.tokens, &pairs.target}) {
      for (Id& token : *side) {
        if (token < 10 || spread == 0) continue;
        token = static_cast<Id>(spread == 1 ? token * 70001 : spread == 2 ? -token : (int64_t{token} << 40) + 7);
        if (token == kPad) token = 5;
      }
    }
    check_pairs(pairs, true);
    return rows;
  };
  for (int64_t done = 0; done < kRandomPairs;) done += below(random, 2) == 0 ? check(int64_t{}) : check(int32_t{});
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
