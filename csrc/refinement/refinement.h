// CPU kernels of the refinement family, on a range of rows.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

namespace condgen_fast::simd {
struct BFloat16;
struct Half;
}  // namespace condgen_fast::simd

namespace condgen_fast::refinement {

// Logit is float, double, simd::BFloat16 or simd::Half.
template <class Logit>
struct RowStatsArguments {
  // inputs
  const Logit* logits;  // [N, V], rows `stride` apart
  int64_t stride;
  int64_t width;             // V, at least 1
  const int64_t* rows;       // [M], each in [0, N), or null: all of them
  const float* temperature;  // [1] or [M], `temperature_step` is 0 or 1; null: argmax
  int64_t temperature_step;
  uint64_t seed;
  const int64_t* noise_rows = nullptr;  // [M], what the noise takes for the row's number; null: the row's number
  // outputs
  int64_t* token;   // [M]
  float* log_prob;  // [M]
  float* margin;    // [M]
  float* entropy;   // [M]
  int64_t* best;    // [M], the argmax, which `token` is not where it is drawn; or null
};

struct RemaskArguments {
  // inputs
  const float* scores;   // [B, T]
  const int64_t* count;  // [B]
  const bool* maskable;  // [B, T]
  int64_t width;         // T
  // outputs
  bool* masked;  // [B, T]
};

enum class Policy { kQuota, kAtLeast, kEntropy };

// Canvas is the type of its ids.
template <class Canvas>
struct CommitArguments {
  // inputs
  const int64_t* token;    // [B, T]
  const float* ranking;    // [B, T], the highest first; for kEntropy the lowest
  const Canvas* canvas;    // [B, T]
  const bool* maskable;    // [B, T]
  const int64_t* minimum;  // [B], or null: `least` for all
  const float* bound;      // [B], or null: `limit` for all; kQuota reads neither
  int64_t least;
  float limit;
  const bool* active;  // [B] or null
  int64_t width;       // T
  Policy policy;
  // outputs
  Canvas* out;      // [B, T]
  bool* committed;  // [B, T]
};

CONDGEN_FAST_CPU_DECLARE(template <class Logit>
                         void row_stats(const RowStatsArguments<Logit>& arguments, int64_t begin, int64_t end);

                         void remask(const RemaskArguments& arguments, int64_t begin, int64_t end);

                         template <class Canvas>
                         void commit(const CommitArguments<Canvas>& arguments, int64_t begin, int64_t end);)

}  // namespace condgen_fast::refinement
