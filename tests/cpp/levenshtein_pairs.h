// Random pairs of sentences, and what the ops make of them worked out on whole matrices, which know nothing of bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "levenshtein/levenshtein.h"

namespace condgen_fast::levenshtein {
namespace {

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

// Distances between all prefixes of x and y, a row of n + 1 for each i; substitution is 1 or, as not there, 2.
template <class Id>
const uint32_t* distances(const Id* x, int64_t m, const Id* y, int64_t n, uint32_t substitution) {
  static std::vector<uint32_t> table;
  if (static_cast<int64_t>(table.size()) < (m + 1) * (n + 1)) table.resize((m + 1) * (n + 1));
  uint32_t* d = table.data();
  for (int64_t j = 0; j <= n; ++j) d[j] = static_cast<uint32_t>(j);
  for (int64_t i = 1; i <= m; ++i) {
    uint32_t* row = d + i * (n + 1);
    const uint32_t* above = row - (n + 1);
    row[0] = static_cast<uint32_t>(i);
    for (int64_t j = 1; j <= n; ++j) {
      row[j] = std::min({above[j] + 1, row[j - 1] + 1, above[j - 1] + (x[i - 1] == y[j - 1] ? 0 : substitution)});
    }
  }
  return d;
}

template <class Id>
int64_t length_of(const Id* row, int64_t width) {
  return std::find(row, row + width, static_cast<Id>(kPad)) - row;
}

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
    const int64_t m = length_of(x, pairs.width), n = length_of(y, pairs.target_width);
    const uint32_t* d = distances(x, m, y, n, 2);
    auto at = [&](int64_t i, int64_t j) { return d[i * (n + 1) + j]; };
    labels.distance[b] = at(m, n);
    int64_t kept = (m + n - at(m, n)) / 2;
    for (int64_t i = m, j = n; i > 0 || j > 0;) {
      if (j > 0 && at(i, j - 1) < at(i, j)) {
        ++labels.insert[b * (pairs.width - 1) + (source_slots ? i : kept) - 1];
        labels.masked[b * pairs.target_width + --j] = true;
      } else if (i > 0 && at(i - 1, j) < at(i, j)) {
        labels.delete_labels[b * pairs.width + --i] = true;
      } else {
        --i, --j, --kept;
      }
    }
  }
}

// Kept tokens and, in each slot, the next missing tokens of the target: what the labels make of a row.
template <class Id>
bool labels_give_target(const Labels<Id>& labels, int64_t b, bool source_slots) {
  const Pairs<Id>& pairs = labels.pairs;
  const Id* x = pairs.tokens.data() + b * pairs.width;
  const Id* y = pairs.target.data() + b * pairs.target_width;
  const int64_t m = length_of(x, pairs.width), n = length_of(y, pairs.target_width);
  int64_t written = 0, slot = 0, edits = 0;
  for (int64_t i = 0; i < m; ++i) {
    const bool deleted = labels.delete_labels[b * pairs.width + i];
    edits += deleted;
    if (!deleted && (written >= n || y[written++] != x[i] || labels.masked[b * pairs.target_width + written - 1])) {
      return false;
    }
    if (deleted && !source_slots) continue;
    if (slot >= pairs.width - 1) continue;
    for (int64_t k = labels.insert[b * (pairs.width - 1) + slot++]; k > 0; --k, ++edits) {
      if (written >= n || !labels.masked[b * pairs.target_width + written++]) return false;
    }
  }
  return written == n && edits == labels.distance[b];
}

template <class Id>
struct Alignment {
  explicit Alignment(const Pairs<Id>& pairs)
      : pairs(pairs),
        tokens(pairs.rows * (pairs.width + pairs.target_width), -7),
        target(tokens.size(), -7),
        lengths(pairs.rows, -7),
        distance(pairs.rows, -7) {}
  AlignmentArguments<Id> arguments() {
    return {pairs.tokens.data(), pairs.target.data(), pairs.width,    pairs.target_width, kPad, kMask,
            tokens.data(),       target.data(),       lengths.data(), distance.data()};
  }
  bool operator==(const Alignment& other) const {
    return tokens == other.tokens && target == other.target && lengths == other.lengths && distance == other.distance;
  }
  const Pairs<Id>& pairs;
  std::vector<Id> tokens, target;
  std::vector<int64_t> lengths, distance;
};

// "pair, else delete, else insert" from the end, on the matrix of unit-cost distances.
template <class Id>
void align_by_matrix(Alignment<Id>& alignment) {
  const Pairs<Id>& pairs = alignment.pairs;
  const int64_t out_width = pairs.width + pairs.target_width;
  std::fill(alignment.tokens.begin(), alignment.tokens.end(), static_cast<Id>(kPad));
  std::fill(alignment.target.begin(), alignment.target.end(), static_cast<Id>(kPad));
  for (int64_t b = 0; b < pairs.rows; ++b) {
    const Id* x = pairs.tokens.data() + b * pairs.width;
    const Id* y = pairs.target.data() + b * pairs.target_width;
    const int64_t m = length_of(x, pairs.width), n = length_of(y, pairs.target_width);
    const uint32_t* d = distances(x, m, y, n, 1);
    auto at = [&](int64_t i, int64_t j) { return d[i * (n + 1) + j]; };
    alignment.distance[b] = at(m, n);
    std::vector<std::pair<Id, Id>> steps;
    for (int64_t i = m, j = n; i > 0 || j > 0;) {
      if (i > 0 && j > 0 && at(i, j) == at(i - 1, j - 1) + (x[i - 1] != y[j - 1])) {
        --i, --j;
        steps.push_back({x[i], y[j]});
      } else if (i > 0 && at(i, j) == at(i - 1, j) + 1) {
        steps.push_back({x[--i], static_cast<Id>(kMask)});
      } else {
        steps.push_back({static_cast<Id>(kMask), y[--j]});
      }
    }
    alignment.lengths[b] = static_cast<int64_t>(steps.size());
    for (size_t k = 0; k < steps.size(); ++k) {
      alignment.tokens[b * out_width + k] = steps[steps.size() - 1 - k].first;
      alignment.target[b * out_width + k] = steps[steps.size() - 1 - k].second;
    }
  }
}

}  // namespace
}  // namespace condgen_fast::levenshtein
