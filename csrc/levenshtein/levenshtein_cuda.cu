// Launches of the CUDA kernels, one block of one warp a sentence, and the CUDA ops.
#include "common/cuda_utils.cuh"
#include "levenshtein/apply_edits_kernel.cuh"
#include "levenshtein/edit_distance_kernels.cuh"
#include "levenshtein/edit_oracle_kernel.cuh"
#include "levenshtein/levenshtein_tensors.h"
#include "levenshtein/noise.h"

namespace condgen_fast::levenshtein {
namespace {

// A table for each sentence: in shared memory where a block may have that much without asking, else in `memory`.
struct Scratch {
  Scratch(const Tensor& like, int64_t batch, int64_t words) : words(words) {
    constexpr int64_t kSharedBytes = 48 * 1024;
    if (4 * words <= kSharedBytes) {
      shared_bytes = static_cast<size_t>(4 * words);
    } else {
      memory = allocate(like, {batch, words}, aoti_torch_dtype_int32());
    }
  }
  uint32_t* data() const { return memory ? reinterpret_cast<uint32_t*>(memory->mutable_data_ptr<int32_t>()) : nullptr; }

  int64_t words;  // of 32 bits, a sentence
  size_t shared_bytes = 0;
  std::optional<Tensor> memory;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_oracle_cuda(const Tensor& tokens, const Tensor& target, int64_t pad_id,
                                                            bool source_slots) {
  const OnDeviceOf device(tokens);
  return edit_oracle_op(tokens, target, pad_id, source_slots, [&](const auto& arguments, int64_t batch) {
    const Scratch table(tokens, batch, oracle_words(arguments.width, arguments.other_width));
    edit_oracle_kernel<<<batch, kWarp, table.shared_bytes, device.stream()>>>(arguments, table.data(), table.words);
    check_launch("edit_oracle");
  });
}

Tensor edit_distance_cuda(const Tensor& a, const Tensor& b, int64_t pad_id, bool substitution, bool all_pairs) {
  const OnDeviceOf device(a);
  return edit_distance_op(a, b, pad_id, substitution, all_pairs, [&](const auto& arguments, int64_t pairs) {
    CONDGEN_FAST_CHECK(pairs <= INT32_MAX, "a and b must make at most 2147483647 pairs on a GPU; got ", pairs);
    const Scratch rows(a, pairs, 2 * ceil_div<int64_t>(arguments.other_width, kWarp));
    edit_distance_kernel<<<pairs, kWarp, rows.shared_bytes, device.stream()>>>(arguments, rows.data(), rows.words);
    check_launch("edit_distance");
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_alignment_cuda(const Tensor& tokens, const Tensor& target,
                                                               int64_t pad_id, int64_t gap_id) {
  const OnDeviceOf device(tokens);
  return edit_alignment_op(tokens, target, pad_id, gap_id, [&](const auto& arguments, int64_t batch) {
    const Scratch tables(tokens, batch, alignment_words(arguments.width, arguments.other_width));
    edit_alignment_kernel<<<batch, kWarp, tables.shared_bytes, device.stream()>>>(arguments, tables.data(),
                                                                                  tables.words);
    check_launch("edit_alignment");
  });
}

// A thread a sentence: its draws depend on one another, and there are few of them.
template <class Id>
__global__ void random_noise_kernel(NoiseArguments<Id> arguments, int64_t batch) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= batch) return;
  const Id* row = arguments.tokens + b * arguments.width;
  int64_t length = arguments.width;
  while (length > 0 && row[length - 1] == arguments.pad_id) --length;
  add_noise(arguments, b, length);
}

Tensor random_noise_cuda(const Tensor& tokens, const Tensor& seed, int64_t kind, int64_t pad_id, int64_t bos_id,
                         int64_t eos_id, int64_t mask_id, int64_t distance) {
  const OnDeviceOf device(tokens);
  auto run = [&](const auto& arguments, int64_t batch) {
    random_noise_kernel<<<ceil_div<int64_t>(batch, kWarp), kWarp, 0, device.stream()>>>(arguments, batch);
    check_launch("random_noise");
  };
  return random_noise_op(tokens, seed, kind, pad_id, bos_id, eos_id, mask_id, distance, run);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apply_edits_cuda(
    const Tensor& tokens, const std::optional<Tensor>& delete_labels, const std::optional<Tensor>& insert,
    const std::optional<Tensor>& fill, const std::optional<Tensor>& scores, int64_t pad_id, int64_t bos_id,
    int64_t eos_id, int64_t mask_id, int64_t width, const std::optional<Tensor>& bounds) {
  const OnDeviceOf device(tokens);
  auto run = [&](const auto& arguments, int64_t batch) {
    apply_edits_kernel<<<batch, kWarp, 0, device.stream()>>>(arguments);
    check_launch("apply_edits");
  };
  return apply_edits_op(tokens, delete_labels, insert, fill, scores, pad_id, bos_id, eos_id, mask_id, width, bounds,
                        run);
}

}  // namespace
}  // namespace condgen_fast::levenshtein

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CUDA, m) {
  m.impl("edit_oracle", TORCH_BOX(&condgen_fast::levenshtein::edit_oracle_cuda));
  m.impl("edit_distance", TORCH_BOX(&condgen_fast::levenshtein::edit_distance_cuda));
  m.impl("edit_alignment", TORCH_BOX(&condgen_fast::levenshtein::edit_alignment_cuda));
  m.impl("random_noise", TORCH_BOX(&condgen_fast::levenshtein::random_noise_cuda));
  m.impl("apply_edits", TORCH_BOX(&condgen_fast::levenshtein::apply_edits_cuda));
}
