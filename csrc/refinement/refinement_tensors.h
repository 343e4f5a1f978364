// Tensors of remask and commit: what CPU and CUDA check and allocate alike. `run` gets the arguments and B.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "common/check.h"
#include "refinement/refinement.h"

namespace condgen_fast::refinement {

inline Tensor checked(const Tensor& value, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes,
                      const Tensor& like) {
  check_shape(value, name, sizes);
  check_dtype(value, name, {dtype});
  check_same_device(value, name, like, "the others");
  return value.is_contiguous() ? value : torch::stable::contiguous(value);  // a call of torch takes a microsecond
}

template <class Run>
Tensor remask_op(const Tensor& scores,    // [B, T]
                 const Tensor& count,     // [B]
                 const Tensor& maskable,  // [B, T]
                 const Run& run) {
  check_shape(scores, "scores", {-1, -1});
  const int64_t batch = scores.size(0), width = scores.size(1);
  const Tensor s = checked(scores, "scores", ScalarType::Float, {batch, width}, scores);
  const Tensor c = checked(count, "count", ScalarType::Long, {batch}, scores);
  const Tensor m = checked(maskable, "maskable", ScalarType::Bool, {batch, width}, scores);
  Tensor masked = torch::stable::new_empty(m, {batch, width});
  const RemaskArguments arguments{s.const_data_ptr<float>(), c.const_data_ptr<int64_t>(), m.const_data_ptr<bool>(),
                                  width, masked.mutable_data_ptr<bool>()};
  if (batch > 0 && width > 0) run(arguments, batch);
  return masked;
}

template <class Run>
std::tuple<Tensor, Tensor> commit_op(const Tensor& token,                   // [B, T]
                                     const Tensor& ranking,                 // [B, T]
                                     const Tensor& canvas,                  // [B, T]
                                     const Tensor& maskable,                // [B, T]
                                     const std::optional<Tensor>& minimum,  // [B]
                                     const std::optional<Tensor>& bound,    // [B]
                                     const std::optional<Tensor>& active,   // [B]
                                     int64_t least, double limit, int64_t policy, const Run& run) {
  check_shape(canvas, "canvas", {-1, -1});
  check_dtype(canvas, "canvas", {ScalarType::Long, ScalarType::Int});
  const int64_t batch = canvas.size(0), width = canvas.size(1);
  const Tensor t = checked(token, "token", ScalarType::Long, {batch, width}, canvas);
  const Tensor r = checked(ranking, "ranking", ScalarType::Float, {batch, width}, canvas);
  const Tensor x = canvas.is_contiguous() ? canvas : torch::stable::contiguous(canvas);
  const Tensor m = checked(maskable, "maskable", ScalarType::Bool, {batch, width}, canvas);
  CONDGEN_FAST_CHECK(policy >= 0 && policy <= static_cast<int64_t>(Policy::kEntropy), "policy must be 0, 1 or 2; got ",
                     policy);
  std::optional<Tensor> n, b, a;
  if (minimum) n = checked(*minimum, "minimum", ScalarType::Long, {batch}, canvas);
  if (bound) b = checked(*bound, "bound", ScalarType::Float, {batch}, canvas);
  if (active) a = checked(*active, "active", ScalarType::Bool, {batch}, canvas);
  Tensor out = torch::stable::new_empty(x, {batch, width});
  Tensor committed = torch::stable::new_empty(m, {batch, width});
  const auto with_type = [&](auto id) {
    using Canvas = decltype(id);
    CommitArguments<Canvas> arguments;
    arguments.token = t.const_data_ptr<int64_t>();
    arguments.ranking = r.const_data_ptr<float>();
    arguments.canvas = x.const_data_ptr<Canvas>();
    arguments.maskable = m.const_data_ptr<bool>();
    arguments.minimum = n ? n->const_data_ptr<int64_t>() : nullptr;
    arguments.bound = b ? b->const_data_ptr<float>() : nullptr;
    arguments.active = a ? a->const_data_ptr<bool>() : nullptr;
    arguments.width = width;
    arguments.least = least;
    arguments.limit = static_cast<float>(limit);
    arguments.policy = static_cast<Policy>(policy);
    arguments.out = out.mutable_data_ptr<Canvas>();
    arguments.committed = committed.mutable_data_ptr<bool>();
    if (batch > 0 && width > 0) run(arguments, batch);
  };
  if (canvas.scalar_type() == ScalarType::Long) {
    with_type(int64_t{});
  } else {
    with_type(int32_t{});
  }
  return {out, committed};
}

}  // namespace condgen_fast::refinement
