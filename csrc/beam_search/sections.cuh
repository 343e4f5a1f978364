// What the kernels of beam_topk hand to each other: candidates, and where a row is cut.
#pragma once

#include "beam_search_tensors.h"
#include "common/cuda_utils.cuh"

namespace condgen_fast::beam_search {
namespace {

// A token and its logit in one number: the higher logit is the greater, of equal ones the lower token.
using Candidate = uint64_t;

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // logits of a tile
constexpr int kTile = kThreads * kPerThread;
constexpr int kTilesInSection = 2;
constexpr int64_t kSection = kTile * kTilesInSection;
constexpr int kSpare = 256;  // candidates beyond k before they are ranked
constexpr int64_t kMostCandidates = 1024;
constexpr int kBlocksPerProcessor = 4;  // to aim at where rows are few

struct Sections {
  int64_t pieces;   // of a row
  int64_t per_row;  // sections
  int64_t per_piece;
  int64_t kept;  // candidates of a piece
  // scratch
  Candidate* best;     // [B * K, pieces, kept] descending
  float* highest;      // [B * K, per_row]
  float* sums;         // [B * K, per_row]
  struct List* lists;  // [B * K, pieces, and one more where totals are adjusted]
};

// The candidates of one piece while they are merged.
struct List {
  float highest, log_sum;  // of the row; log_sum is NaN for an empty beam
  float last_total;        // of the candidate that went into the result last
  int used;                // how many did
  Candidate last_key;
};

__device__ float minus_infinity() { return -__int_as_float(0x7f800000); }

__device__ Candidate candidate(float logit, int64_t token) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are one value
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Candidate>(ordered) << 32 | static_cast<unsigned>(~token);
}

__device__ float logit_of(Candidate candidate) {
  const unsigned ordered = static_cast<unsigned>(candidate >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ int64_t token_of(Candidate candidate) { return static_cast<unsigned>(~candidate); }

// What a beam is restricted to, and which of its totals are changed.
template <class Logit>
struct Lists {
  const int64_t *adjusted, *allowed;
  const float* amounts;
  int64_t adjustments, allowed_count;
  bool restricted;

  __device__ Lists(const Arguments<Logit>& arguments, int64_t b, int64_t i)
      : adjusted(nullptr),
        allowed(nullptr),
        amounts(nullptr),
        adjustments(arguments.adjustments),
        allowed_count(0),
        restricted(false) {
    if (adjustments > 0) {
      const int64_t offset = b * arguments.adjusted_sentence_stride + i * arguments.adjusted_beam_stride;
      adjusted = arguments.adjusted + offset;
      amounts = arguments.amounts + offset;
    }
    if (arguments.first != nullptr) {
      const int64_t first = arguments.first[b * arguments.beams + i];
      restricted = first >= 0;
      if (restricted) {
        allowed = arguments.allowed + first;
        // The host cannot refuse what lies beyond the lists without waiting: it is left out.
        allowed_count = min(arguments.last[b * arguments.beams + i], arguments.allowed_size) - first;
      }
    }
  }

  __device__ bool is_adjusted(int64_t token) const {
    for (int64_t j = 0; j < adjustments; ++j) {
      if (adjusted[j] == token) return true;
    }
    return false;
  }

  __device__ bool is_allowed(int64_t token) const {
    for (int64_t j = 0; j < allowed_count; ++j) {
      if (allowed[j] == token) return true;
    }
    return !restricted;
  }
};

}  // namespace
}  // namespace condgen_fast::beam_search
