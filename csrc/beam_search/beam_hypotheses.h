// The way back from a finished hypothesis through what a beam search kept, the same code on CPU and GPU.
#pragma once

#include <cstdint>

#include "beam_update.h"

namespace condgen_fast::beam_search {

struct Finished {
  int64_t steps, batch, beams, count;  // T, B, K, n
  int64_t pad_id, ends_count;
  const int64_t* finished;          // [3, B, n] parents, tokens, lengths
  const float* sums;                // [B, n]
  const int64_t *tokens, *parents;  // [T, B, K]
  const float* totals;              // [T, B, K]
  const int64_t* ends;              // [E]
  int64_t* out_tokens;              // [B, n, T]
  int64_t* out_lengths;             // [B, n]
  float* out_log_probs;             // [B, n, T + 1]
};

namespace {

// Whether everything said was in range; if not, the hypothesis is of no meaning, but nothing else is touched.
CONDGEN_FAST_TEAMWORK inline bool trace_back(const Finished& f, int64_t hypothesis) {
  const int64_t all = f.batch * f.count, token = f.finished[all + hypothesis];
  bool ended = token < 0;
  for (int64_t i = 0; i < f.ends_count; ++i) ended |= f.ends[i] == token;
  bool in_range = true;
  const int64_t place = within(f.finished[2 * all + hypothesis] - 1, f.steps, &in_range);  // of the last token
  int64_t* tokens = f.out_tokens + hypothesis * f.steps;
  float* log_probs = f.out_log_probs + hypothesis * (f.steps + 1);
  for (int64_t step = place; step < f.steps; ++step) {
    tokens[step] = step == place && !ended ? token : f.pad_id;
    log_probs[step + 1] = 0.0f;
  }
  int64_t slot = within(f.finished[hypothesis], f.beams, &in_range);
  float after = f.sums[hypothesis];
  for (int64_t step = place - 1; step >= 0; --step) {
    const int64_t at = (step * f.batch + hypothesis / f.count) * f.beams + slot;
    tokens[step] = f.tokens[at];
    log_probs[step + 1] = after - f.totals[at];
    after = f.totals[at];
    slot = within(f.parents[at], f.beams, &in_range);
  }
  log_probs[0] = after;
  f.out_lengths[hypothesis] = place + (ended ? 0 : 1);
  return in_range;
}

}  // namespace
}  // namespace condgen_fast::beam_search
