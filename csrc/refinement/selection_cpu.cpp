#include <algorithm>
#include <vector>

#include "refinement/ranking.h"
#include "refinement/refinement.h"

namespace condgen_fast::refinement::CONDGEN_FAST_ISA {
namespace {

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
      std::fill_n(committed, a.width, false);
      const auto key = [&](int64_t i) { return entropy ? surest_first(ranking[i]) : highest_first(ranking[i]); };
      collect(maskable, a.width, key, candidates);
      int64_t allowed = 0;
      if (entropy) {
        std::sort(candidates.begin(), candidates.end());
        int64_t units = 0;
        for (Candidate candidate : candidates) {
          if (!fits(units, bound)) break;
          units += entropy_units(ranking[static_cast<uint32_t>(candidate)]);
          ++allowed;
        }
      }
      choose(candidates, std::max(allowed, minimum), committed);
    }
    const int64_t* token = a.token + first;
    const Canvas* canvas = a.canvas + first;
    Canvas* out = a.out + first;
    for (int64_t i = 0; i < a.width; ++i) out[i] = committed[i] ? static_cast<Canvas>(token[i]) : canvas[i];
  }
}

template void commit<int32_t>(const CommitArguments<int32_t>&, int64_t, int64_t);
template void commit<int64_t>(const CommitArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::refinement::CONDGEN_FAST_ISA
