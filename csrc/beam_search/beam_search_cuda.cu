// beam_topk on a GPU: the pieces of all rows, then the sentences.
//
// As on the CPU a row is read once, in sections that leave their highest logit and sum of exponentials wherever the row
// is cut, so that the batch cannot be seen in the result.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "merge.cuh"
#include "scan.cuh"

namespace condgen_fast::beam_search {
namespace {

int processors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "beam_topk");
  return count;
}

template <class Logit>
void beam_topk(const Arguments<Logit>& arguments, int64_t batch, const Tensor& logits) {
  const OnDeviceOf device(logits);
  const int64_t rows = batch * arguments.beams;
  Sections sections{};
  sections.per_row = ceil_div(arguments.vocab, kSection);
  const int64_t wanted =
      ceil_div<int64_t>(kBlocksPerProcessor * processors(logits.get_device_index()), std::max<int64_t>(rows, 1));
  sections.per_piece =
      ceil_div(sections.per_row, std::clamp<int64_t>(wanted, 1, std::max<int64_t>(sections.per_row, 1)));
  sections.per_piece = std::max<int64_t>(sections.per_piece, 1);
  sections.pieces = std::max<int64_t>(ceil_div(sections.per_row, sections.per_piece), 1);
  sections.kept = std::min({arguments.k, arguments.vocab, sections.per_piece * kSection});
  CONDGEN_FAST_CHECK(sections.kept <= kMostCandidates, "k must be at most ", kMostCandidates, " on a GPU; got ",
                     arguments.k);
  CONDGEN_FAST_CHECK(rows * sections.pieces <= INT32_MAX, "logits must have at most ", INT32_MAX,
                     " rows on a GPU; got ", rows);

  // one allocation, the eight-byte members first
  const int64_t best_words = rows * sections.pieces * sections.kept,
                list_words = 3 * rows * (sections.pieces + (arguments.adjustments > 0 ? 1 : 0));
  Tensor scratch =
      torch::stable::new_empty(logits, {best_words + list_words + rows * sections.per_row}, ScalarType::Long);
  static_assert(sizeof(List) == 3 * sizeof(int64_t));
  auto* words = static_cast<int64_t*>(scratch.data_ptr());
  sections.best = reinterpret_cast<Candidate*>(words);
  sections.lists = reinterpret_cast<List*>(words + best_words);
  sections.highest = reinterpret_cast<float*>(words + best_words + list_words);
  sections.sums = sections.highest + rows * sections.per_row;

  if (sections.kept > 0 && rows > 0) {
    const size_t shared =
        sizeof(Candidate) * (sections.kept + kSpare + kTile + std::max<int64_t>(sections.kept, kThreads));
    constexpr int64_t kPack = 16 / sizeof(Logit);
    const bool aligned = reinterpret_cast<uintptr_t>(arguments.logits) % 16 == 0 &&
                         arguments.sentence_stride % kPack == 0 && arguments.beam_stride % kPack == 0;
    const auto kernel = aligned ? scan_kernel<Logit, true> : scan_kernel<Logit, false>;
    kernel<<<rows * sections.pieces, kThreads, shared, device.stream()>>>(arguments, sections);
    check_launch("beam_topk: scan");
  }
  merge_kernel<<<batch, kWarpSize, 0, device.stream()>>>(arguments, sections);
  check_launch("beam_topk: merge");
}

std::tuple<Tensor, Tensor, Tensor> beam_topk_cuda(const Tensor& logits, const Tensor& scores, int64_t k,
                                                  double temperature, const std::optional<Tensor>& adjusted,
                                                  const std::optional<Tensor>& amounts,
                                                  const std::optional<Tensor>& allowed,
                                                  const std::optional<Tensor>& first,
                                                  const std::optional<Tensor>& last) {
  return beam_topk_op<__half, __nv_bfloat16>(
      logits, scores, k, temperature, {adjusted, amounts, allowed, first, last},
      [&](const auto& arguments, int64_t batch) { beam_topk(arguments, batch, logits); });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CUDA, m) {
  m.impl("beam_topk", TORCH_BOX(&condgen_fast::beam_search::beam_topk_cuda));
}
