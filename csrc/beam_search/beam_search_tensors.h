// Tensors of beam_topk: what CPU and CUDA check and allocate alike. `run` gets the arguments and B.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>

#include "beam_search.h"
#include "common/check.h"

namespace condgen_fast::beam_search {

constexpr int64_t kMostWanted = int64_t{1} << 20;

// call(pointer) with the type that the logits have
template <class Half, class BFloat16, class Call>
void with_logits(const Tensor& logits, const Call& call) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return call(static_cast<const float*>(logits.data_ptr()));
    case ScalarType::BFloat16:
      return call(static_cast<const BFloat16*>(logits.data_ptr()));
    case ScalarType::Half:
      return call(static_cast<const Half*>(logits.data_ptr()));
    default:
      return call(static_cast<const double*>(logits.data_ptr()));
  }
}

// What a call has besides logits and scores; all or none of each line are given.
struct Constraints {
  const std::optional<Tensor>&adjusted, &amounts;      // [B, K, M] int64 and float32
  const std::optional<Tensor>&allowed, &first, &last;  // [E], [B, K], [B, K] int64
};

inline const int64_t* ids_of(const Tensor& value) { return static_cast<const int64_t*>(value.data_ptr()); }

template <class Half, class BFloat16, class Run>
std::tuple<Tensor, Tensor, Tensor> beam_topk_op(const Tensor& logits,  // [B, K, V]
                                                const Tensor& scores,  // [B, K]
                                                int64_t k, double temperature, const Constraints& constraints,
                                                const Run& run) {
  check_shape(logits, "logits", {-1, -1, -1});
  const int64_t batch = logits.size(0), beams = logits.size(1), vocab = logits.size(2);
  check_dtype(logits, "logits", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  check_shape(scores, "scores", {batch, beams});
  check_dtype(scores, "scores", {ScalarType::Float});
  check_same_device(scores, "scores", logits, "logits");
  constexpr float kLeast = std::numeric_limits<float>::min(), kMost = std::numeric_limits<float>::max();
  CONDGEN_FAST_CHECK(k >= 1, "k must be >= 1; got ", k);
  CONDGEN_FAST_CHECK(k <= kMostWanted, "k must be at most ", kMostWanted, "; got ", k);
  CONDGEN_FAST_CHECK(temperature > 0, "temperature must be > 0; got ", temperature);
  CONDGEN_FAST_CHECK(beams <= INT32_MAX && vocab <= INT32_MAX, "logits must have at most ", INT32_MAX,
                     " beams and tokens; got ", beams, " and ", vocab);
  const Tensor x = vocab <= 1 || logits.stride(2) == 1 ? logits : torch::stable::contiguous(logits);
  const Tensor s = torch::stable::contiguous(scores);

  const bool adjusts = constraints.adjusted && constraints.amounts, restricts = constraints.allowed.has_value();
  Tensor adjusted = s, amounts = s, allowed = s, first = s, last = s;  // unused unless there are such
  if (adjusts) {
    check_shape(*constraints.adjusted, "adjusted", {batch, beams, -1});
    check_dtype(*constraints.adjusted, "adjusted", {ScalarType::Long});
    check_shape(*constraints.amounts, "amounts", {batch, beams, constraints.adjusted->size(2)});
    check_dtype(*constraints.amounts, "amounts", {ScalarType::Float});
    check_same_device(*constraints.adjusted, "adjusted", logits, "logits");
    check_same_device(*constraints.amounts, "amounts", logits, "logits");
    adjusted = *constraints.adjusted, amounts = *constraints.amounts;
    // a list for all beams stays one list
    const bool alike = adjusted.size(2) <= 1 || (adjusted.stride(2) == 1 && amounts.stride(2) == 1);
    if (!alike || adjusted.stride(0) != amounts.stride(0) || adjusted.stride(1) != amounts.stride(1)) {
      adjusted = torch::stable::contiguous(adjusted), amounts = torch::stable::contiguous(amounts);
    }
  }
  if (restricts) {
    CONDGEN_FAST_CHECK(constraints.first && constraints.last, "first and last must be given where allowed is");
    check_shape(*constraints.allowed, "allowed", {-1});
    check_shape(*constraints.first, "first", {batch, beams});
    check_shape(*constraints.last, "last", {batch, beams});
    for (const auto& [value, name] : {std::pair{&*constraints.allowed, "allowed"},
                                      std::pair{&*constraints.first, "first"}, std::pair{&*constraints.last, "last"}}) {
      check_dtype(*value, name, {ScalarType::Long});
      check_same_device(*value, name, logits, "logits");
    }
    allowed = torch::stable::contiguous(*constraints.allowed);
    first = torch::stable::contiguous(*constraints.first);
    last = torch::stable::contiguous(*constraints.last);
  }

  Tensor out_scores = torch::stable::new_empty(s, {batch, k});
  Tensor out_parents = torch::stable::new_empty(s, {batch, k}, ScalarType::Long);
  Tensor out_tokens = torch::stable::new_empty(s, {batch, k}, ScalarType::Long);
  with_logits<Half, BFloat16>(x, [&](auto* data) {
    Arguments<std::remove_const_t<std::remove_pointer_t<decltype(data)>>> arguments{};
    arguments.logits = data;
    arguments.sentence_stride = x.stride(0);
    arguments.beam_stride = x.stride(1);
    arguments.scores = s.const_data_ptr<float>();
    arguments.beams = beams;
    arguments.vocab = vocab;
    arguments.k = k;
    arguments.temperature = static_cast<float>(std::clamp<double>(temperature, kLeast, kMost));
    arguments.power_scale = std::min(1.44269504f / arguments.temperature, kMost);
    if (adjusts) {
      arguments.adjusted = ids_of(adjusted);
      arguments.amounts = amounts.const_data_ptr<float>();
      arguments.adjustments = adjusted.size(2);
      arguments.adjusted_sentence_stride = adjusted.stride(0);
      arguments.adjusted_beam_stride = adjusted.stride(1);
    }
    if (restricts) {
      arguments.allowed = ids_of(allowed);
      arguments.allowed_size = allowed.numel();
      arguments.first = ids_of(first);
      arguments.last = ids_of(last);
    }
    arguments.out_scores = out_scores.mutable_data_ptr<float>();
    arguments.out_parents = out_parents.mutable_data_ptr<int64_t>();
    arguments.out_tokens = out_tokens.mutable_data_ptr<int64_t>();
    if (batch > 0) run(arguments, batch);
  });
  return {out_scores, out_parents, out_tokens};
}

}  // namespace condgen_fast::beam_search
