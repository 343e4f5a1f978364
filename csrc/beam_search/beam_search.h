// CPU kernels of the beam_search family: first scan pieces of rows, then merge the pieces of each sentence.
//
// A row is the logits of one beam. It is read in blocks of kBlock logits, each of which leaves its highest logit and
// its sum of exponentials; the sums of a row are added up in the order of its blocks whichever thread made them, so the
// number of threads and of pieces cannot be seen in the result.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

namespace condgen_fast::simd {
struct Half;
struct BFloat16;
}  // namespace condgen_fast::simd

namespace condgen_fast::beam_search {

constexpr int64_t kBlock = 1024;  // logits; a block is read twice, the second time from the first-level cache

// A token and its logit in one number: the higher logit is the greater, of equal ones the lower token.
using Candidate = uint64_t;

// How the rows that are read (those of beams that are not empty) are cut, and what the scan leaves of them.
struct Pieces {
  const int64_t* rows;  // [R] b * K + i
  int64_t row_count;    // R
  int64_t per_row;      // P pieces of a row
  int64_t blocks;       // in a piece; the last of a row may be shorter or empty
  int64_t kept;         // candidates of a piece, min(k, logits in a piece)
  float* highest;       // [R, P * blocks]
  float* sums;          // [R, P * blocks] of exp((logit - highest) / temperature)
  Candidate* best;      // [R, P, kept] descending
  int64_t* found;       // [R, P] how many of these there are
};

// Logit: float, double or the device's own sixteen-bit types
template <class Logit>
struct Arguments {
  // inputs
  const Logit* logits;  // [B, K, V], the last dimension contiguous
  int64_t sentence_stride, beam_stride;
  const float* scores;  // [B, K]
  int64_t beams;        // K
  int64_t vocab;        // V
  int64_t k;
  float temperature;
  float power_scale;  // log2(e) / temperature, finite so that 0 times it is 0
  // outputs
  float* out_scores;     // [B, k]
  int64_t* out_parents;  // [B, k]
  int64_t* out_tokens;   // [B, k]
};

CONDGEN_FAST_CPU_DECLARE(
    // Pieces [begin, end) of R * P.
    template <class Logit>
    void scan(const Arguments<Logit>& arguments, const Pieces& pieces, int64_t begin, int64_t end);

    // Sentences [begin, end). row_of [B, K] is the place in `pieces.rows`, -1 for an empty beam.
    template <class Logit> void merge(const Arguments<Logit>& arguments, const Pieces& pieces, const int64_t* row_of,
                                      int64_t begin, int64_t end);)

}  // namespace condgen_fast::beam_search
