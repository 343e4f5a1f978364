// CPU kernel of the kd_loss family: losses and gradient of a range of rows.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

namespace condgen_fast::kd_loss {

enum class Dtype { kFloat, kBFloat16, kHalf, kDouble };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

// As in DIVERGENCES of checks.py
enum class Divergence { kCrossEntropy, kForwardKl, kReverseKl, kJsd, kTvd };

struct Options {
  Divergence divergence;
  double hard;  // factor of the negative log-likelihood; 0: labels are not read
  double soft;  // factor of the divergence; 0: the teacher is not read
  double temperature;
  double teacher_temperature;
  double jsd_beta;
  double label_smoothing;
  double z_loss;
};

// Logits [A, B, V]
struct Logits {
  const void* data;
  Dtype dtype;
  int64_t inner;         // B
  int64_t outer_stride;  // elements
  int64_t stride;
  int64_t width;  // V
};

// Bytes from the first row to row n of A * B
inline int64_t offset_of_row(const Logits& logits, int64_t n) {
  return (n / logits.inner * logits.outer_stride + n % logits.inner * logits.stride) * size_of(logits.dtype);
}

// Columns of Arguments::parts, as in KDLossParts of parts.py
enum Part {
  kNll,
  kDivergence,
  kStudentLogSumExp,
  kTeacherLogSumExp,
  kStudentEntropy,
  kTeacherEntropy,
  kAgreement,
  kAccuracy,
  kParts
};

// Reals are float, or double where the student is double.
struct Arguments {
  Options options;
  int64_t rows;  // N
  // inputs
  Logits student;         // [A, B, V]
  Logits teacher;         // [A, B, V'] logits; data is null without
  const int64_t* ids;     // [N, k], distinct in a row; null without a sparse teacher
  const void* listed;     // [N, k] reals: probabilities of ids
  int64_t listed_stride;  // of rows; 0: all share one
  const void* floor;      // [N] reals: the probability of every other token
  int64_t k;
  const int64_t* labels;    // [N] or null
  const void* coefficient;  // [N] reals: factor of loss and gradient; rows with 0 are not read
  // outputs
  void* losses;     // [N] reals
  void* parts;      // [N, kParts] reals, or null: labels and teacher are read for them whatever the factors are
  Logits gradient;  // of the student's dtype and shape, where it may lie as well; data is null without
  bool stream;      // write the gradient past the caches
};

// clang-format off
CONDGEN_FAST_CPU_DECLARE(void loss_of_rows(const Arguments& arguments, int64_t begin, int64_t end);)
// clang-format on

}  // namespace condgen_fast::kd_loss
