#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "refinement/ranking.h"
#include "refinement/refinement.h"

namespace condgen_fast::refinement::CONDGEN_FAST_ISA {
namespace {

// What a position is chosen by, the lower first; signed, as only such are compared in one instruction everywhere.
using Key = int32_t;
constexpr Key kNever = std::numeric_limits<Key>::max();  // no key of ranking.h: what is not maskable

Key signed_key(uint32_t key) { return static_cast<Key>(key ^ kSign); }

// The keys of a row; what is below `key` is chosen, and of what equals it the first `ties` positions.
struct Cut {
  Key key;
  int64_t ties;
};

struct Row {
  std::vector<Key> keys;
  std::vector<int64_t> units;  // of entropies
  int64_t open;
  Key lowest, highest;

  template <class KeyOf>
  void read(const bool* maskable, int64_t width, const KeyOf& key_of) {
    constexpr Key kLeast = std::numeric_limits<Key>::min();
    keys.resize(width);
    Key* const out = keys.data();
    Key least = kNever, most = kLeast;
    int32_t number = 0;
    for (int64_t i = 0; i < width; ++i) {
      const Key key = signed_key(key_of(i));  // whether it counts or not: a loop without branches
      const bool counts = maskable[i];
      out[i] = counts ? key : kNever;
      least = std::min(least, counts ? key : kNever);
      most = std::max(most, counts ? key : kLeast);
      number += counts;
    }
    lowest = least;
    highest = most;
    open = number;
  }

  int32_t below(Key limit) const {
    int32_t number = 0;
    for (Key key : keys) number += key < limit;
    return number;
  }

  int64_t units_below(Key limit) const {
    int64_t sum = 0;
    for (size_t i = 0; i < keys.size(); ++i) sum += keys[i] < limit ? units[i] : 0;
    return sum;
  }

  // The highest limit that `fits`, found bit by bit below those that all keys share; what fits has all below it fit.
  // `fits` may call a limit the last, by `*done = true`.
  template <class Fits>
  Key highest_that(const Fits& fits) const {
    const uint32_t unlike = static_cast<uint32_t>(lowest ^ highest);
    const int bits = unlike == 0 ? 0 : 32 - __builtin_clz(unlike);
    uint32_t limit = static_cast<uint32_t>(lowest) ^ kSign;
    limit = bits == 32 ? 0 : limit >> bits << bits;
    bool done = false;
    for (int bit = bits - 1; bit >= 0 && !done; --bit) {
      const uint32_t trial = limit | 1u << bit;
      if (fits(signed_key(trial), &done)) limit = trial;
    }
    return signed_key(limit);
  }

  // 1 <= count < open.
  Cut cut_after(int64_t count) const {
    const Key key = highest_that([&](Key limit, bool* done) {
      const int64_t number = below(limit);
      *done = number == count;
      return number <= count;
    });
    return {key, count - below(key)};
  }

  // How many positions the entropy policy allows: as long as the entropies before a position fit the bound.
  int64_t allowed(float bound) const {
    if (!fits(0, bound)) return 0;
    const Key key = highest_that([&](Key limit, bool*) { return fits(units_below(limit), bound); });
    int64_t sum = units_below(key), number = below(key);
    for (size_t i = 0; i < keys.size() && fits(sum, bound); ++i) {
      if (keys[i] != key) continue;
      sum += units[i];
      ++number;
    }
    return number;
  }

  void choose(int64_t count, bool* chosen) const {
    const int64_t width = static_cast<int64_t>(keys.size());
    if (count <= 0 || count >= open) {
      for (int64_t i = 0; i < width; ++i) chosen[i] = (count > 0) & (keys[i] != kNever);
      return;
    }
    Cut cut = cut_after(count);
    for (int64_t i = 0; i < width; ++i) chosen[i] = keys[i] < cut.key;
    for (int64_t i = 0; cut.ties > 0; ++i) {
      const bool tied = keys[i] == cut.key;
      chosen[i] |= tied;
      cut.ties -= tied;
    }
  }
};

}  // namespace

void remask(const RemaskArguments& a, int64_t begin, int64_t end) {
  Row row;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * a.width;
    row.read(a.maskable + first, a.width, [&](int64_t i) { return lowest_first(a.scores[first + i]); });
    row.choose(a.count[b], a.masked + first);
  }
}

template <class Canvas>
void commit(const CommitArguments<Canvas>& a, int64_t begin, int64_t end) {
  Row row;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * a.width;
    const float* ranking = a.ranking + first;
    const bool* maskable = a.maskable + first;
    bool* committed = a.committed + first;
    const bool entropy = a.policy == Policy::kEntropy, at_least = a.policy == Policy::kAtLeast;
    const int64_t minimum = a.minimum ? a.minimum[b] : a.least;
    const float bound = a.bound ? a.bound[b] : a.limit;
    const bool active = a.active == nullptr || a.active[b];
    int64_t reached = 0;
    if (active && at_least) {
      for (int64_t i = 0; i < a.width; ++i) committed[i] = maskable[i] & reaches(ranking[i], bound);
      for (int64_t i = 0; i < a.width; ++i) reached += committed[i];
    } else {
      std::fill_n(committed, a.width, false);
    }
    if (active && (!at_least || reached < minimum)) {  // else those that reach the bound are chosen
      int64_t allowed = 0;
      if (entropy) {
        row.read(maskable, a.width, [&](int64_t i) { return surest_first(ranking[i]); });
        row.units.resize(a.width);
        int64_t* const units = row.units.data();
        for (int64_t i = 0; i < a.width; ++i) units[i] = entropy_units(ranking[i]);
        allowed = row.allowed(bound);
      } else {
        row.read(maskable, a.width, [&](int64_t i) { return highest_first(ranking[i]); });
      }
      row.choose(std::max(allowed, minimum), committed);
    }
    const int64_t* token = a.token + first;
    const Canvas* canvas = a.canvas + first;
    Canvas* out = a.out + first;
    for (int64_t i = 0; i < a.width; ++i) {
      const Canvas written = static_cast<Canvas>(token[i]), before = canvas[i];
      out[i] = committed[i] ? written : before;
    }
  }
}

template void commit<int32_t>(const CommitArguments<int32_t>&, int64_t, int64_t);
template void commit<int64_t>(const CommitArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::refinement::CONDGEN_FAST_ISA
