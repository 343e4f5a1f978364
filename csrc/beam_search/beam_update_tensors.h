// Tensors of beam_update and beam_hypotheses: what CPU and CUDA check and allocate alike.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "beam_hypotheses.h"
#include "common/check.h"

namespace condgen_fast::beam_search {

struct Expected {
  const char* name;
  ScalarType dtype;
  std::vector<int64_t> sizes;
};

// The tensor's memory, once it has been checked.
template <class T>
T* memory_of(const Tensor& value, const Expected& expected, const Tensor& other) {
  bool fits = value.dim() == static_cast<int64_t>(expected.sizes.size());
  for (int64_t d = 0; fits && d < value.dim(); ++d) fits = value.size(d) == expected.sizes[d];
  if (!fits) {
    std::ostringstream wanted;
    for (int64_t size : expected.sizes) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
    fail(expected.name, " must have shape [", wanted.str(), "]");
  }
  check_dtype(value, expected.name, {expected.dtype});
  check_same_device(value, expected.name, other, "tokens");
  CONDGEN_FAST_CHECK(value.is_contiguous(), expected.name, " must be contiguous");
  return static_cast<T*>(value.data_ptr());
}

inline Update checked_update(const Tensor& ranks, const Tensor& sums, const Tensor& parents, const Tensor& tokens,
                             const std::vector<Tensor>& state, const std::vector<Tensor>& constants,
                             const std::vector<int64_t>& rules) {
  CONDGEN_FAST_CHECK(state.size() == 13 && constants.size() == 5 && rules.size() == kRules,
                     "state, constants and rules must be those of a BeamState");
  enum { kSentences, kChosen, kTotals, kFlags, kProgress, kFinishedIds, kFinishedTotals, kLatticeIds, kLatticeTotals };
  enum { kBans = kLatticeTotals + 1, kRanges, kHistory, kNodes };
  enum { kEnds, kNorms, kBanned, kPrefixLengths, kTrie };
  const auto size = [](const Tensor& value, int64_t d) { return d < value.dim() ? value.size(d) : 0; };

  Update u{};
  std::copy_n(rules.begin(), kRules, reinterpret_cast<int64_t*>(&u.rules));
  u.rows = size(state[kChosen], 1);
  u.beams = size(state[kChosen], 2);
  u.groups = size(state[kFlags], 2);
  u.candidates = size(tokens, 1);
  u.steps = size(state[kLatticeIds], 1);
  u.batch = size(state[kLatticeIds], 2);
  u.capacity = size(state[kFinishedIds], 3);
  u.ranked = size(state[kTotals], 0) - 1;
  u.ends_count = size(constants[kEnds], 0);
  u.banned_count = size(constants[kBanned], 0);
  u.ban_lists = size(state[kBans], 1);
  u.bans_count = size(state[kBans], 2);
  u.history_width = size(state[kHistory], 3);
  u.ranges_wanted = size(state[kRanges], 2) > 0;
  u.nodes_wanted = size(state[kNodes], 2) > 0;
  const Rules& r = u.rules;
  const int64_t R = u.rows, B = u.batch, K = u.beams, G = u.groups, C = u.candidates, H = u.capacity, T = u.steps;
  CONDGEN_FAST_CHECK(R <= B, "sentences must be at most ", B, "; got ", R);
  CONDGEN_FAST_CHECK(G > 0 && K % G == 0, "groups must divide beams = ", K, "; got ", G);
  CONDGEN_FAST_CHECK(C >= K / G, "tokens must have at least ", K / G, " columns; got ", C);
  CONDGEN_FAST_CHECK(u.ranked == 0 || u.ranked == 1, "totals must have one or two parts; got ", u.ranked + 1);
  CONDGEN_FAST_CHECK(r.wanted >= 1 && r.wanted <= H && r.n_best >= 1 && r.n_best <= H,
                     "wanted and n_best must be in [1, ", H, "]; got ", r.wanted, " and ", r.n_best);
  const int64_t windows = u.bans_count - u.banned_count;
  CONDGEN_FAST_CHECK(windows == 0 || (u.ban_lists == K && r.no_repeat_ngram > 0 && windows <= u.history_width),
                     "bans must have ", u.banned_count, " columns without no_repeat_ngram; got ", u.bans_count);
  CONDGEN_FAST_CHECK(u.history_width == 0 || u.history_width >= T, "history must have 0 or at least ", T, " columns");
  CONDGEN_FAST_CHECK(u.ban_lists == 1 || u.ban_lists == K, "bans must have 1 or ", K, " lists; got ", u.ban_lists);
  const int64_t of_trie = size(constants[kTrie], 0), prefixed = r.longest_prefix > 0 ? B : 0;
  u.trie_edges = u.nodes_wanted ? (of_trie - 1) / 2 - r.trie_nodes : 0;
  CONDGEN_FAST_CHECK(!u.nodes_wanted || (r.trie_nodes > 0 && u.trie_edges > 0), "trie must have nodes and edges");

  constexpr ScalarType kLong = ScalarType::Long, kFloat = ScalarType::Float;
  const int64_t ranked = 1 + u.ranked, ranges = u.ranges_wanted ? K : 0, nodes = u.nodes_wanted ? K : 0;
  const auto longs = [&](const Tensor& value, const char* name, std::vector<int64_t> sizes) {
    return memory_of<int64_t>(value, {name, kLong, std::move(sizes)}, tokens);
  };
  const auto floats = [&](const Tensor& value, const char* name, std::vector<int64_t> sizes) {
    return memory_of<float>(value, {name, kFloat, std::move(sizes)}, tokens);
  };
  u.found_ranks = floats(ranks, "ranks", {R * G, C});
  u.found_sums = floats(sums, "sums", {R * G, C});
  u.found_parents = longs(parents, "parents", {R * G, C});
  u.found_tokens = longs(tokens, "tokens", {R * G, C});
  u.ends = longs(constants[kEnds], "ends", {u.ends_count});
  u.norms = floats(constants[kNorms], "norms", {T + 2});
  u.banned = longs(constants[kBanned], "banned", {u.banned_count});
  u.prefix_lengths = longs(constants[kPrefixLengths], "prefix_lengths", {prefixed});
  u.trie = longs(constants[kTrie], "trie", {of_trie});
  u.sentences = longs(state[kSentences], "sentences", {3, R});
  u.chosen = longs(state[kChosen], "chosen", {2, R, K});
  u.totals = floats(state[kTotals], "totals", {ranked, R, K});
  u.flags = memory_of<bool>(state[kFlags], {"flags", ScalarType::Bool, {2, R, G}}, tokens);
  u.progress = longs(state[kProgress], "progress", {B + 1});
  u.finished_ids = longs(state[kFinishedIds], "finished_ids", {3, B, G, H});
  u.finished_totals = floats(state[kFinishedTotals], "finished_totals", {2, B, G, H});
  u.lattice_ids = longs(state[kLatticeIds], "lattice_ids", {2, T, B, K});
  u.lattice_totals = floats(state[kLatticeTotals], "lattice_totals", {ranked, T, B, K});
  u.bans = longs(state[kBans], "bans", {R, u.ban_lists, u.bans_count});
  u.ranges = longs(state[kRanges], "ranges", {2, R, ranges});
  u.history = longs(state[kHistory], "history", {2, R, K, u.history_width});
  u.nodes = longs(state[kNodes], "nodes", {2, R, nodes});
  return u;
}

// run(finished) with tensors for its results
template <class Run>
std::tuple<Tensor, Tensor, Tensor> beam_hypotheses_op(const Tensor& finished, const Tensor& sums, const Tensor& tokens,
                                                      const Tensor& parents, const Tensor& totals, const Tensor& ends,
                                                      int64_t pad_id, const Run& run) {
  check_shape(finished, "finished", {3, -1, -1});
  check_shape(tokens, "tokens", {-1, finished.size(1), -1});
  Finished f{};
  f.batch = finished.size(1), f.count = finished.size(2), f.steps = tokens.size(0), f.beams = tokens.size(2);
  CONDGEN_FAST_CHECK(f.batch * f.count == 0 || f.steps * f.beams > 0, "tokens must hold a step and a beam at least");
  f.ends_count = ends.numel();
  f.pad_id = pad_id;
  constexpr ScalarType kLong = ScalarType::Long, kFloat = ScalarType::Float;
  const std::vector<int64_t> lattice{f.steps, f.batch, f.beams};
  f.finished = memory_of<int64_t>(finished, {"finished", kLong, {3, f.batch, f.count}}, tokens);
  f.sums = memory_of<float>(sums, {"sums", kFloat, {f.batch, f.count}}, tokens);
  f.tokens = memory_of<int64_t>(tokens, {"tokens", kLong, lattice}, tokens);
  f.parents = memory_of<int64_t>(parents, {"parents", kLong, lattice}, tokens);
  f.totals = memory_of<float>(totals, {"totals", kFloat, lattice}, tokens);
  f.ends = memory_of<int64_t>(ends, {"ends", kLong, {f.ends_count}}, tokens);
  Tensor out_tokens = torch::stable::new_empty(tokens, {f.batch, f.count, f.steps});
  Tensor out_lengths = torch::stable::new_empty(tokens, {f.batch, f.count});
  Tensor out_log_probs = torch::stable::new_empty(sums, {f.batch, f.count, f.steps + 1});
  f.out_tokens = out_tokens.mutable_data_ptr<int64_t>();
  f.out_lengths = out_lengths.mutable_data_ptr<int64_t>();
  f.out_log_probs = out_log_probs.mutable_data_ptr<float>();
  if (f.batch * f.count > 0) run(f);
  return {out_tokens, out_lengths, out_log_probs};
}

}  // namespace condgen_fast::beam_search
