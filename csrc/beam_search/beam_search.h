// CPU kernels of the beam_search family: first sweep the rows, then select in each sentence.
//
// A row is the logits of one beam. It is read in blocks of kBlock logits, each of which leaves its highest logit, the
// highest of each of its kColumns columns, and its sum of exponentials. What a block leaves depends on its logits only,
// and the sums of a row are added up in the order of its blocks, so neither the number of threads nor the rest of the
// batch can be seen in the result.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

namespace condgen_fast::simd {
struct Half;
struct BFloat16;
}  // namespace condgen_fast::simd

namespace condgen_fast::beam_search {

constexpr int64_t kBlock = 4096;  // logits
constexpr int64_t kColumns = 64;  // of a block: column c are its logits c, c + 64, c + 128, ...

// What the sweep leaves of each block.
struct Blocks {
  float* columns;  // [R, blocks of a row, kColumns] highest logits, -inf where there is none
  float* highest;  // [R, blocks of a row]
  double* sums;    // [R, blocks of a row] of 2^(logit * power_scale - shift)
  double* shifts;  // [R, blocks of a row]
  int64_t per_row;
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
  // tokens whose totals are changed; those outside [0, V) stand for none
  const int64_t* adjusted;  // [B, K, M], the last dimension contiguous
  const float* amounts;     // [B, K, M] with the same strides
  int64_t adjustments;      // M
  int64_t adjusted_sentence_stride, adjusted_beam_stride;
  // tokens that a beam is restricted to, allowed[first[b, i]] up to allowed[last[b, i]], each once; first < 0: to none
  const int64_t* allowed;
  int64_t allowed_size;
  const int64_t* first;  // [B, K], null: no beam is restricted
  const int64_t* last;   // [B, K]
  // outputs
  float* out_scores;     // [B, k]
  int64_t* out_parents;  // [B, k]
  int64_t* out_tokens;   // [B, k]
};

CONDGEN_FAST_CPU_DECLARE(
    // Blocks [begin, end) of the B * K * blocks.per_row; those of row r are written at r - first_row.
    template <class Logit>
    void sweep(const Arguments<Logit>& arguments, const Blocks& blocks, int64_t first_row, int64_t begin, int64_t end);

    // Sentences [begin, end), whose rows have been swept.
    template <class Logit> void select(const Arguments<Logit>& arguments, const Blocks& blocks, int64_t first_row,
                                       int64_t begin, int64_t end);)

}  // namespace condgen_fast::beam_search
