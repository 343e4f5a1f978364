// Schemas of the levenshtein family, and its CPU ops: they allocate, split the rows over threads and refuse bad rows.
#include "levenshtein.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

namespace condgen_fast::levenshtein {

#define DECLARE(ISA)                                                                                   \
  namespace ISA {                                                                                      \
  template <class Id>                                                                                  \
  BadRows edit_oracle(const OracleArguments<Id>& arguments, int64_t begin, int64_t end);               \
  template <class Id>                                                                                  \
  BadRows edit_distance(const DistanceArguments<Id>& arguments, int64_t begin, int64_t end);           \
  template <class Id, class Score>                                                                     \
  BadRows apply_edits(const ApplyArguments<Id, Score>& arguments, int64_t begin, int64_t end);         \
  }
DECLARE(baseline)
#undef DECLARE

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A range shorter than this is done before a second thread has started.
constexpr int64_t kRangeTokens = 8192;

// Runs kernel(begin, end) on ranges of rows; cost is the number of tokens in a row.
template <class Kernel>
BadRows over_rows(int64_t rows, int64_t cost, const Kernel& kernel) {
  BadRows bad;
  std::mutex mutex;
  const int64_t grain = std::max<int64_t>(1, kRangeTokens / std::max<int64_t>(1, cost));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const BadRows found = kernel(begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    bad.padded_first = std::min(bad.padded_first, found.padded_first);
    bad.padded_second = std::min(bad.padded_second, found.padded_second);
    bad.other = std::min(bad.other, found.other);
  });
  return bad;
}

// std::invalid_argument arrives in Python as ValueError.
template <class Id>
void refuse_padding(int64_t row, const Id* tokens, int64_t width, int64_t pad_id, const char* name) {
  if (row == kNoRow) return;
  const Id* first = tokens + row * width;
  const int64_t position = std::find(first, first + width, static_cast<Id>(pad_id)) - first;
  throw std::invalid_argument(std::string(name) + " must be right-padded; got pad_id " + std::to_string(pad_id) +
                              " before a token in row " + std::to_string(row) + ", position " +
                              std::to_string(position));
}

template <class Call>
auto with_id_type(const Tensor& tokens, const Call& call) {
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long || tokens.scalar_type() == ScalarType::Int,
                  "token ids must be int64 or int32");
  return tokens.scalar_type() == ScalarType::Long ? call(int64_t{}) : call(int32_t{});
}

void check_pair(const Tensor& first, const Tensor& second) {
  STD_TORCH_CHECK(first.dim() == 2 && second.dim() == 2 && first.size(0) == second.size(0),
                  "expected [B, S] and [B, T]");
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), "expected equal dtypes");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_oracle_cpu(const Tensor& tokens,  // [B, S]
                                                           const Tensor& target,  // [B, T]
                                                           int64_t pad_id, bool source_slots) {
  check_pair(tokens, target);
  const int64_t batch = tokens.size(0), width = tokens.size(1), target_width = target.size(1);
  const Tensor x = torch::stable::contiguous(tokens), y = torch::stable::contiguous(target);
  Tensor delete_labels = torch::stable::new_empty(tokens, {batch, width}, ScalarType::Bool);
  Tensor insert = torch::stable::new_empty(tokens, {batch, std::max<int64_t>(width - 1, 0)}, ScalarType::Long);
  Tensor masked = torch::stable::new_empty(tokens, {batch, target_width}, ScalarType::Bool);
  Tensor distance = torch::stable::new_empty(tokens, {batch}, ScalarType::Long);
  with_id_type(tokens, [&](auto id) {
    using Id = decltype(id);
    const OracleArguments<Id> arguments{
        x.const_data_ptr<Id>(),         y.const_data_ptr<Id>(),           width, target_width, pad_id, source_slots,
        delete_labels.mutable_data_ptr<bool>(), insert.mutable_data_ptr<int64_t>(),
        masked.mutable_data_ptr<bool>(), distance.mutable_data_ptr<int64_t>()};
    const BadRows bad = over_rows(batch, width + target_width, [&](int64_t begin, int64_t end) {
      return baseline::edit_oracle(arguments, begin, end);
    });
    refuse_padding(bad.padded_first, arguments.tokens, width, pad_id, "tokens");
    refuse_padding(bad.padded_second, arguments.target, target_width, pad_id, "target");
    if (bad.other != kNoRow) {
      throw std::invalid_argument(
          std::string("target must need no insertion before the first or after the last ") +
          (source_slots ? "source" : "kept") + " token; got one in row " + std::to_string(bad.other) +
          " (let tokens and target share bos and eos)");
    }
  });
  return {delete_labels, insert, masked, distance};
}

Tensor edit_distance_cpu(const Tensor& a,  // [B, S]
                         const Tensor& b,  // [B, T]
                         int64_t pad_id, bool substitution) {
  check_pair(a, b);
  const int64_t batch = a.size(0), width = a.size(1), other_width = b.size(1);
  const Tensor x = torch::stable::contiguous(a), y = torch::stable::contiguous(b);
  Tensor distance = torch::stable::new_empty(a, {batch}, ScalarType::Long);
  with_id_type(a, [&](auto id) {
    using Id = decltype(id);
    const DistanceArguments<Id> arguments{x.const_data_ptr<Id>(), y.const_data_ptr<Id>(), width, other_width,
                                          pad_id, substitution, distance.mutable_data_ptr<int64_t>()};
    const BadRows bad = over_rows(batch, width + other_width, [&](int64_t begin, int64_t end) {
      return baseline::edit_distance(arguments, begin, end);
    });
    refuse_padding(bad.padded_first, arguments.a, width, pad_id, "a");
    refuse_padding(bad.padded_second, arguments.b, other_width, pad_id, "b");
  });
  return distance;
}

template <class Id, class Score>
void apply_edits_rows(const ApplyArguments<Id, Score>& arguments, int64_t batch) {
  const BadRows bad = over_rows(batch, arguments.width + arguments.out_width, [&](int64_t begin, int64_t end) {
    return baseline::apply_edits(arguments, begin, end);
  });
  refuse_padding(bad.padded_first, arguments.tokens, arguments.width, arguments.pad_id, "tokens");
  if (bad.other == kNoRow) return;
  const int64_t* counts = arguments.insert + bad.other * (arguments.width - 1);
  const int64_t slot = std::find_if(counts, counts + arguments.width - 1, [](int64_t n) { return n < 0; }) - counts;
  throw std::invalid_argument("insert must not be negative; got " + std::to_string(counts[slot]) + " in row " +
                              std::to_string(bad.other) + ", slot " + std::to_string(slot));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apply_edits_cpu(const Tensor& tokens,                 // [B, S]
                                                           const std::optional<Tensor>& deleted,  // [B, S]
                                                           const std::optional<Tensor>& insert,   // [B, S-1]
                                                           const std::optional<Tensor>& fill,     // [B, W]
                                                           const std::optional<Tensor>& scores,   // [B, S]
                                                           int64_t pad_id, int64_t bos_id, int64_t eos_id,
                                                           int64_t mask_id, int64_t width) {
  const int64_t batch = tokens.size(0), source_width = tokens.size(1);
  STD_TORCH_CHECK(width >= 1 || source_width == 0, "width must be at least 1");
  auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
  };
  const Tensor x = torch::stable::contiguous(tokens);
  const auto deleted_rows = contiguous(deleted), insert_rows = contiguous(insert), fill_rows = contiguous(fill),
             score_rows = contiguous(scores);
  Tensor out_tokens = torch::stable::new_empty(tokens, {batch, width});
  Tensor out_scores = scores.has_value() ? torch::stable::new_empty(*scores, {batch, width})
                                         : torch::stable::new_empty(tokens, {0}, ScalarType::Float);
  Tensor lengths = torch::stable::new_empty(tokens, {batch}, ScalarType::Long);
  Tensor origin = torch::stable::new_empty(tokens, {batch, width}, ScalarType::Long);
  with_id_type(tokens, [&](auto id) {
    using Id = decltype(id);
    auto run = [&](auto score) {
      using Score = decltype(score);
      apply_edits_rows(
          ApplyArguments<Id, Score>{
              x.const_data_ptr<Id>(), deleted_rows ? deleted_rows->const_data_ptr<bool>() : nullptr,
              insert_rows ? insert_rows->const_data_ptr<int64_t>() : nullptr,
              fill_rows ? fill_rows->const_data_ptr<Id>() : nullptr,
              score_rows ? static_cast<const Score*>(score_rows->data_ptr()) : nullptr, source_width, width, pad_id,
              bos_id, eos_id, mask_id, out_tokens.mutable_data_ptr<Id>(),
              score_rows ? static_cast<Score*>(out_scores.data_ptr()) : nullptr,
              lengths.mutable_data_ptr<int64_t>(), origin.mutable_data_ptr<int64_t>()},
          batch);
    };
    switch (scores.has_value() ? scores->element_size() : 4) {
      case 2:
        return run(uint16_t{});
      case 4:
        return run(uint32_t{});
      default:
        return run(uint64_t{});
    }
  });
  return {out_tokens, out_scores, lengths, origin};
}

}  // namespace
}  // namespace condgen_fast::levenshtein

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def("edit_oracle(Tensor tokens, Tensor target, int pad_id, bool source_slots) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_distance(Tensor a, Tensor b, int pad_id, bool substitution) -> Tensor");
  m.def(
      "apply_edits(Tensor tokens, Tensor? delete, Tensor? insert, Tensor? fill, Tensor? scores, int pad_id, "
      "int bos_id, int eos_id, int mask_id, SymInt width) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("edit_oracle", TORCH_BOX(&condgen_fast::levenshtein::edit_oracle_cpu));
  m.impl("edit_distance", TORCH_BOX(&condgen_fast::levenshtein::edit_distance_cpu));
  m.impl("apply_edits", TORCH_BOX(&condgen_fast::levenshtein::apply_edits_cpu));
}
