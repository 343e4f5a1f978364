// Tensors of the levenshtein ops: what CPU and CUDA check and allocate alike. `run` gets the arguments and B.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "levenshtein/levenshtein.h"

namespace condgen_fast::levenshtein {

template <class Call>
void with_id_type(const Tensor& tokens, const Call& call) {
  if (tokens.scalar_type() == ScalarType::Long) {
    call(int64_t{});
  } else {
    call(int32_t{});
  }
}

inline void check_pair(const Tensor& first, const char* first_name, const Tensor& second, const char* second_name,
                       bool row_by_row) {
  check_shape(first, first_name, {-1, -1});
  check_dtype(first, first_name, {ScalarType::Long, ScalarType::Int});
  check_shape(second, second_name, {-1, -1});
  check_dtype(second, second_name, {first.scalar_type()});
  check_same_device(second, second_name, first, first_name);
  CONDGEN_FAST_CHECK(!row_by_row || first.size(0) == second.size(0), second_name, " must have ", first.size(0),
                     " rows; got ", second.size(0));
}

inline void check_like(const std::optional<Tensor>& value, const char* name, const Tensor& tokens, ScalarType dtype,
                       int64_t columns) {
  if (!value) return;
  check_shape(*value, name, {tokens.size(0), columns});
  check_dtype(*value, name, {dtype});
  check_same_device(*value, name, tokens, "tokens");
}

// torch::stable::contiguous and new_empty go through the dispatcher's stack and take a microsecond, which is what eight
// short pairs take.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return packed(*tensor);
}

// Uninitialised, on the device of `like`; dtype as of aoti_torch_dtype_...().
inline Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()),
                                                          &dtype, nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> edit_oracle_op(const Tensor& tokens,  // [B, S]
                                                          const Tensor& target,  // [B, T]
                                                          int64_t pad_id, bool source_slots, const Run& run) {
  check_pair(tokens, "tokens", target, "target", true);
  const int64_t batch = tokens.size(0), width = tokens.size(1), target_width = target.size(1);
  const Tensor x = packed(tokens), y = packed(target);
  Tensor delete_labels = allocate(tokens, {batch, width}, aoti_torch_dtype_bool());
  Tensor insert = allocate(tokens, {batch, std::max<int64_t>(width - 1, 0)}, aoti_torch_dtype_int64());
  Tensor masked = allocate(tokens, {batch, target_width}, aoti_torch_dtype_bool());
  Tensor distance = allocate(tokens, {batch}, aoti_torch_dtype_int64());
  with_id_type(tokens, [&](auto id) {
    using Id = decltype(id);
    OracleArguments<Id> arguments;
    arguments.tokens = x.const_data_ptr<Id>();
    arguments.target = y.const_data_ptr<Id>();
    arguments.width = width;
    arguments.other_width = target_width;
    arguments.pad_id = pad_id;
    arguments.source_slots = source_slots;
    arguments.delete_labels = delete_labels.mutable_data_ptr<bool>();
    arguments.insert = insert.mutable_data_ptr<int64_t>();
    arguments.masked = masked.mutable_data_ptr<bool>();
    arguments.distance = distance.mutable_data_ptr<int64_t>();
    if (batch > 0) run(arguments, batch);
  });
  return {delete_labels, insert, masked, distance};
}

template <class Run>
Tensor edit_distance_op(const Tensor& a,  // [B, S]
                        const Tensor& b,  // [B, T]
                        int64_t pad_id, bool substitution, bool all_pairs, const Run& run) {
  check_pair(a, "a", b, "b", !all_pairs);
  const int64_t pairs = a.size(0) * (all_pairs ? b.size(0) : 1);
  const Tensor x = packed(a), y = packed(b);
  Tensor distance = all_pairs ? allocate(a, {a.size(0), b.size(0)}, aoti_torch_dtype_int64())
                              : allocate(a, {a.size(0)}, aoti_torch_dtype_int64());
  with_id_type(a, [&](auto id) {
    using Id = decltype(id);
    DistanceArguments<Id> arguments;
    arguments.a = x.const_data_ptr<Id>();
    arguments.b = y.const_data_ptr<Id>();
    arguments.width = a.size(1);
    arguments.other_width = b.size(1);
    arguments.others = all_pairs ? b.size(0) : 0;
    arguments.pad_id = pad_id;
    arguments.substitution = substitution;
    arguments.distance = distance.mutable_data_ptr<int64_t>();
    if (pairs > 0) run(arguments, pairs);
  });
  return distance;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> edit_alignment_op(const Tensor& tokens,  // [B, S]
                                                             const Tensor& target,  // [B, T]
                                                             int64_t pad_id, int64_t gap_id, const Run& run) {
  check_pair(tokens, "tokens", target, "target", true);
  const int64_t batch = tokens.size(0), width = tokens.size(1), other_width = target.size(1);
  const Tensor x = packed(tokens), y = packed(target);
  const bool is_long = tokens.scalar_type() == ScalarType::Long;
  const int32_t dtype = is_long ? aoti_torch_dtype_int64() : aoti_torch_dtype_int32();
  Tensor aligned_tokens = allocate(tokens, {batch, width + other_width}, dtype);
  Tensor aligned_target = allocate(tokens, {batch, width + other_width}, dtype);
  Tensor lengths = allocate(tokens, {batch}, aoti_torch_dtype_int64());
  Tensor distance = allocate(tokens, {batch}, aoti_torch_dtype_int64());
  with_id_type(tokens, [&](auto id) {
    using Id = decltype(id);
    AlignmentArguments<Id> arguments;
    arguments.tokens = x.const_data_ptr<Id>();
    arguments.target = y.const_data_ptr<Id>();
    arguments.width = width;
    arguments.other_width = other_width;
    arguments.pad_id = pad_id;
    arguments.gap_id = gap_id;
    arguments.aligned_tokens = aligned_tokens.mutable_data_ptr<Id>();
    arguments.aligned_target = aligned_target.mutable_data_ptr<Id>();
    arguments.lengths = lengths.mutable_data_ptr<int64_t>();
    arguments.distance = distance.mutable_data_ptr<int64_t>();
    if (batch > 0) run(arguments, batch);
  });
  return {aligned_tokens, aligned_target, lengths, distance};
}

template <class Run>
Tensor random_noise_op(const Tensor& tokens,  // [B, T]
                       const Tensor& seed,    // [1]
                       int64_t kind, int64_t pad_id, int64_t bos_id, int64_t eos_id, int64_t mask_id, int64_t distance,
                       const Run& run) {
  check_shape(tokens, "tokens", {-1, -1});
  check_dtype(tokens, "tokens", {ScalarType::Long, ScalarType::Int});
  check_shape(seed, "seed", {1});
  check_dtype(seed, "seed", {ScalarType::Long});
  check_same_device(seed, "seed", tokens, "tokens");
  CONDGEN_FAST_CHECK(kind >= 0 && kind <= 2, "kind must be 0, 1 or 2; got ", kind);
  const Tensor x = packed(tokens);
  Tensor out = torch::stable::new_empty(tokens, {tokens.size(0), tokens.size(1)});
  with_id_type(tokens, [&](auto id) {
    using Id = decltype(id);
    NoiseArguments<Id> arguments;
    arguments.tokens = x.const_data_ptr<Id>();
    arguments.seed = seed.const_data_ptr<int64_t>();
    arguments.width = tokens.size(1);
    arguments.kind = static_cast<Noise>(kind);
    arguments.pad_id = pad_id;
    arguments.bos_id = bos_id;
    arguments.eos_id = eos_id;
    arguments.mask_id = mask_id;
    arguments.distance = distance;
    arguments.out = out.mutable_data_ptr<Id>();
    if (tokens.numel() > 0) run(arguments, tokens.size(0));
  });
  return out;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> apply_edits_op(const Tensor& tokens,                        // [B, S]
                                                          const std::optional<Tensor>& delete_labels,  // [B, S]
                                                          const std::optional<Tensor>& insert,         // [B, S-1]
                                                          const std::optional<Tensor>& fill,           // [B, W]
                                                          const std::optional<Tensor>& scores,         // [B, S]
                                                          int64_t pad_id, int64_t bos_id, int64_t eos_id,
                                                          int64_t mask_id, int64_t out_width,
                                                          const std::optional<Tensor>& bounds,  // [B]
                                                          const Run& run) {
  check_shape(tokens, "tokens", {-1, -1});
  check_dtype(tokens, "tokens", {ScalarType::Long, ScalarType::Int});
  const int64_t batch = tokens.size(0), width = tokens.size(1);
  CONDGEN_FAST_CHECK(out_width >= 0, "width must not be negative; got ", out_width);
  check_like(delete_labels, "delete", tokens, ScalarType::Bool, width);
  check_like(insert, "insert", tokens, ScalarType::Long, std::max<int64_t>(width - 1, 0));
  check_like(fill, "fill", tokens, tokens.scalar_type(), out_width);
  if (scores) {
    check_dtype(*scores, "scores", {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16});
    check_like(scores, "scores", tokens, scores->scalar_type(), width);
  }
  if (bounds) {
    check_shape(*bounds, "bounds", {batch});
    check_dtype(*bounds, "bounds", {ScalarType::Long});
    check_same_device(*bounds, "bounds", tokens, "tokens");
  }
  const Tensor x = packed(tokens);
  const auto deleted = packed(delete_labels), counts = packed(insert), filling = packed(fill), score = packed(scores),
             bound = packed(bounds);
  Tensor out_tokens = torch::stable::new_empty(tokens, {batch, out_width});
  Tensor out_scores = scores ? torch::stable::new_empty(*scores, {batch, out_width})
                             : allocate(tokens, {0}, aoti_torch_dtype_float32());
  Tensor lengths = allocate(tokens, {batch}, aoti_torch_dtype_int64());
  Tensor origin = allocate(tokens, {batch, out_width}, aoti_torch_dtype_int64());
  with_id_type(tokens, [&](auto id) {
    using Id = decltype(id);
    auto with_score_type = [&](auto bits) {
      using Score = decltype(bits);
      ApplyArguments<Id, Score> arguments;
      arguments.tokens = x.const_data_ptr<Id>();
      arguments.delete_labels = deleted ? deleted->const_data_ptr<bool>() : nullptr;
      arguments.insert = counts ? counts->const_data_ptr<int64_t>() : nullptr;
      arguments.fill = filling ? filling->const_data_ptr<Id>() : nullptr;
      arguments.scores = score ? static_cast<const Score*>(score->data_ptr()) : nullptr;
      arguments.bounds = bound ? bound->const_data_ptr<int64_t>() : nullptr;
      arguments.width = width;
      arguments.out_width = out_width;
      arguments.pad_id = pad_id;
      arguments.bos_id = bos_id;
      arguments.eos_id = eos_id;
      arguments.mask_id = mask_id;
      arguments.out_tokens = out_tokens.mutable_data_ptr<Id>();
      arguments.out_scores = score ? static_cast<Score*>(out_scores.data_ptr()) : nullptr;
      arguments.lengths = lengths.mutable_data_ptr<int64_t>();
      arguments.origin = origin.mutable_data_ptr<int64_t>();
      if (batch > 0) run(arguments, batch);
    };
    const int64_t bytes = score ? score->element_size() : 4;
    if (bytes == 2) {
      with_score_type(uint16_t{});
    } else if (bytes == 4) {
      with_score_type(uint32_t{});
    } else {
      with_score_type(uint64_t{});
    }
  });
  return {out_tokens, out_scores, lengths, origin};
}

}  // namespace condgen_fast::levenshtein
