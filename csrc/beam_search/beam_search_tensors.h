// Tensors of beam_topk: what CPU and CUDA check and allocate alike. `run` gets the arguments and B.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>

#include "beam_search.h"
#include "common/check.h"

namespace condgen_fast::beam_search {

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

template <class Half, class BFloat16, class Run>
std::tuple<Tensor, Tensor, Tensor> beam_topk_op(const Tensor& logits,  // [B, K, V]
                                                const Tensor& scores,  // [B, K]
                                                int64_t k, double temperature, const Run& run) {
  check_shape(logits, "logits", {-1, -1, -1});
  const int64_t batch = logits.size(0), beams = logits.size(1), vocab = logits.size(2);
  check_dtype(logits, "logits", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  check_shape(scores, "scores", {batch, beams});
  check_dtype(scores, "scores", {ScalarType::Float});
  check_same_device(scores, "scores", logits, "logits");
  constexpr float kLeast = std::numeric_limits<float>::min(), kMost = std::numeric_limits<float>::max();
  CONDGEN_FAST_CHECK(k >= 1, "k must be >= 1; got ", k);
  CONDGEN_FAST_CHECK(temperature > 0, "temperature must be > 0; got ", temperature);
  CONDGEN_FAST_CHECK(vocab <= INT32_MAX, "logits must have at most 2147483647 tokens; got ", vocab);
  const Tensor x = vocab <= 1 || logits.stride(2) == 1 ? logits : torch::stable::contiguous(logits);
  const Tensor s = torch::stable::contiguous(scores);
  Tensor out_scores = torch::stable::new_empty(s, {batch, k});
  Tensor out_parents = torch::stable::new_empty(s, {batch, k}, ScalarType::Long);
  Tensor out_tokens = torch::stable::new_empty(s, {batch, k}, ScalarType::Long);
  with_logits<Half, BFloat16>(x, [&](auto* data) {
    Arguments<std::remove_const_t<std::remove_pointer_t<decltype(data)>>> arguments;
    arguments.logits = data;
    arguments.sentence_stride = x.stride(0);
    arguments.beam_stride = x.stride(1);
    arguments.scores = s.const_data_ptr<float>();
    arguments.beams = beams;
    arguments.vocab = vocab;
    arguments.k = k;
    arguments.temperature = static_cast<float>(std::clamp<double>(temperature, kLeast, kMost));
    arguments.power_scale = std::min(1.44269504f / arguments.temperature, kMost);
    arguments.out_scores = out_scores.mutable_data_ptr<float>();
    arguments.out_parents = out_parents.mutable_data_ptr<int64_t>();
    arguments.out_tokens = out_tokens.mutable_data_ptr<int64_t>();
    if (batch > 0) run(arguments, batch);
  });
  return {out_scores, out_parents, out_tokens};
}

}  // namespace condgen_fast::beam_search
