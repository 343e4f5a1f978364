// What a beam search knows from step to step; condgen_fast/ops/beam_search/state.py says what it means.
#pragma once

#include <cstdint>

namespace condgen_fast::beam_search {

enum Stopping : int64_t { kExact, kHeuristic, kFirst, kTopped };

// The numbers of BeamRules, in their order.
struct Rules {
  int64_t stopping, wanted, n_best, min_length;
  int64_t rising, cut_at_limit, in_order, by_rank;  // 0 or 1
  int64_t no_repeat_ngram, always_banned, longest_prefix, trie_nodes, trie_stride;
};
constexpr int64_t kRules = sizeof(Rules) / sizeof(int64_t);

struct Update {
  Rules rules;
  int64_t rows, batch, beams, groups, candidates, capacity, steps;  // R, B, K, G, C, H, T
  int64_t ranked;                   // 1 where ranks stand behind sums, 0 where they are the same
  int64_t ends_count;               // E
  int64_t banned_count, ban_lists;  // N; K, or 1 for all beams of a sentence
  int64_t bans_count;               // M
  int64_t history_width;            // W, 0: none; the first step's hypotheses have W - T tokens
  bool ranges_wanted, nodes_wanted;
  // found, [R * G, C]
  const float *found_ranks, *found_sums;
  const int64_t *found_parents, *found_tokens;
  // constants
  const int64_t* ends;            // [E]
  const float* norms;             // [limits and one more]
  const int64_t* banned;          // [N]
  const int64_t* prefix_lengths;  // [B]
  const int64_t* trie;            // first child of each node and behind the last, ends among them; keys, targets
  int64_t trie_edges;
  // state
  int64_t* sentences;      // [3, R] place in the batch, limit, steps made
  int64_t* chosen;         // [2, R, K] tokens, parents
  float* totals;           // [1 + ranked, R, K]
  bool* flags;             // [2, R, G] finished, topped
  int64_t* progress;       // [B + 1] steps of each sentence, and how many are finished
  int64_t* finished_ids;   // [3, B, G, H] parents, tokens, lengths
  float* finished_totals;  // [2, B, G, H] scores, sums
  int64_t* lattice_ids;    // [2, T, B, K]
  float* lattice_totals;   // [1 + ranked, T, B, K]
  int64_t* bans;           // [R, ban lists, M]
  int64_t* ranges;         // [2, R, K] first, last
  int64_t* history;        // [2, R, K, W] the second for what is being moved
  int64_t* nodes;          // [2, R, K] likewise
};

}  // namespace condgen_fast::beam_search
