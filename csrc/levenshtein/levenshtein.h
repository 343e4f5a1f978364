// CPU kernels of the levenshtein family on a range of rows; everything right-padded with pad_id, rows contiguous.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

#if defined(__CUDACC__)
#define CONDGEN_FAST_HOST_DEVICE __host__ __device__
#else
#define CONDGEN_FAST_HOST_DEVICE
#endif

namespace condgen_fast::levenshtein {

// The lowest row that breaks a rule, or kNoRow.
constexpr int64_t kNoRow = INT64_MAX;

struct BadRows {
  int64_t padded_first = kNoRow;   // padding before a token in the first argument
  int64_t padded_second = kNoRow;  // the same in the second
  int64_t other = kNoRow;          // edit_oracle: an insertion without a slot; apply_edits: a negative count
};

template <class Id>
struct OracleArguments {
  // inputs
  const Id* tokens;     // [B, S]
  const Id* target;     // [B, T]
  int64_t width;        // S
  int64_t other_width;  // T
  int64_t pad_id;
  bool source_slots;
  // outputs
  bool* delete_labels;  // [B, S]
  int64_t* insert;      // [B, max(S-1, 0)]
  bool* masked;         // [B, T]
  int64_t* distance;    // [B]

  CONDGEN_FAST_HOST_DEVICE const Id* first_row(int64_t b) const { return tokens + b * width; }
  CONDGEN_FAST_HOST_DEVICE const Id* second_row(int64_t b) const { return target + b * other_width; }
};

template <class Id>
struct DistanceArguments {
  // inputs
  const Id* a;  // [A, S]
  const Id* b;  // [B, T]
  int64_t width;
  int64_t other_width;
  int64_t others;  // B where every row of a meets every row of b; 0 where row meets row
  int64_t pad_id;
  bool substitution;  // costs 1 (Levenshtein) or is not there (indel)
  // outputs
  int64_t* distance;  // [A, B] or [A]

  CONDGEN_FAST_HOST_DEVICE const Id* first_row(int64_t pair) const {
    return a + (others == 0 ? pair : pair / others) * width;
  }
  CONDGEN_FAST_HOST_DEVICE const Id* second_row(int64_t pair) const {
    return b + (others == 0 ? pair : pair % others) * other_width;
  }
};

template <class Id>
struct AlignmentArguments {
  // inputs
  const Id* tokens;  // [B, S]
  const Id* target;  // [B, T]
  int64_t width;
  int64_t other_width;
  int64_t pad_id;
  int64_t gap_id;
  // outputs
  Id* aligned_tokens;  // [B, S+T]
  Id* aligned_target;  // [B, S+T]
  int64_t* lengths;    // [B]
  int64_t* distance;   // [B]
};

enum class Noise : int64_t { kDelete, kMask, kShuffle };

template <class Id>
struct NoiseArguments {
  // inputs
  const Id* tokens;     // [B, T]
  const int64_t* seed;  // [1]
  int64_t width;
  Noise kind;
  int64_t pad_id, bos_id, eos_id, mask_id;
  int64_t distance;  // of kShuffle: the farthest a token moves; negative: anywhere
  // outputs
  Id* out;  // [B, T]
};

// Scores are copied, never computed with: Score is an unsigned integer of their size, and 0 is 0.0.
template <class Id, class Score>
struct ApplyArguments {
  // inputs
  const Id* tokens;           // [B, S]
  const bool* delete_labels;  // [B, S] or null
  const int64_t* insert;      // [B, max(S-1, 0)] or null
  const Id* fill;             // [B, W] or null
  const Score* scores;        // [B, S] or null
  const int64_t* bounds;      // [B], what placeholders may lengthen a row to, or null: W
  int64_t width;              // S
  int64_t out_width;          // W
  int64_t pad_id, bos_id, eos_id, mask_id;
  // outputs
  Id* out_tokens;     // [B, W]
  Score* out_scores;  // [B, W] or null
  int64_t* lengths;   // [B]
  int64_t* origin;    // [B, W]
};

// Rows [begin, end) of the batch.
CONDGEN_FAST_CPU_DECLARE(
    template <class Id> BadRows edit_oracle(const OracleArguments<Id>& arguments, int64_t begin, int64_t end);
    template <class Id> BadRows edit_distance(const DistanceArguments<Id>& arguments, int64_t begin, int64_t end);
    template <class Id> BadRows edit_alignment(const AlignmentArguments<Id>& arguments, int64_t begin, int64_t end);
    template <class Id> BadRows random_noise(const NoiseArguments<Id>& arguments, int64_t begin, int64_t end);
    template <class Id, class Score>
    BadRows apply_edits(const ApplyArguments<Id, Score>& arguments, int64_t begin, int64_t end);)

}  // namespace condgen_fast::levenshtein
