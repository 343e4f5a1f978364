// CUDA kernels of remask and commit, one block a row, and their registration. row_stats on a GPU is Triton's.
#include "common/cuda_utils.cuh"
#include "refinement/refinement_tensors.h"
#include "refinement/selection.cuh"

namespace condgen_fast::refinement {
namespace {

__global__ void __launch_bounds__(kThreads) remask_kernel(RemaskArguments a) {
  __shared__ Shared shared;
  const int64_t first = blockIdx.x * a.width;
  const bool* maskable = a.maskable + first;
  long long mine = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) mine += maskable[i];
  const long long open = block_sum(mine, shared);
  choose(
      a.count[blockIdx.x], open, maskable, a.width, [&](int64_t i) { return lowest_first(a.scores[first + i]); },
      [&](int64_t i, bool chosen) { a.masked[first + i] = chosen; }, shared);
}

template <class Canvas>
__global__ void __launch_bounds__(kThreads) commit_kernel(CommitArguments<Canvas> a) {
  __shared__ Shared shared;
  const int64_t first = blockIdx.x * a.width;
  const bool* maskable = a.maskable + first;
  const float* ranking = a.ranking + first;
  const bool active = a.active == nullptr || a.active[blockIdx.x];
  const bool entropy = a.policy == Policy::kEntropy;
  const float bound = a.bound ? a.bound[blockIdx.x] : a.limit;
  long long open = 0, count = 0;
  if (active) {
    long long mine = 0, reached = 0;
    for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
      mine += maskable[i];
      if (a.policy == Policy::kAtLeast) reached += maskable[i] && reaches(ranking[i], bound);
    }
    open = block_sum(mine, shared);
    if (a.policy == Policy::kAtLeast) count = block_sum(reached, shared);
    if (entropy) count = allowed_entropies(ranking, maskable, a.width, bound, open, shared);
    count = max(count, static_cast<long long>(a.minimum ? a.minimum[blockIdx.x] : a.least));
  }
  choose(
      count, open, maskable, a.width,
      [&](int64_t i) { return entropy ? surest_first(ranking[i]) : highest_first(ranking[i]); },
      [&](int64_t i, bool chosen) {
        a.committed[first + i] = chosen;
        a.out[first + i] = chosen ? static_cast<Canvas>(a.token[first + i]) : a.canvas[first + i];
      },
      shared);
}

Tensor remask_cuda(const Tensor& scores, const Tensor& count, const Tensor& maskable) {
  const OnDeviceOf device(scores);
  return remask_op(scores, count, maskable, [&](const RemaskArguments& arguments, int64_t batch) {
    remask_kernel<<<batch, kThreads, 0, device.stream()>>>(arguments);
    check_launch("remask");
  });
}

std::tuple<Tensor, Tensor> commit_cuda(const Tensor& token, const Tensor& ranking, const Tensor& canvas,
                                       const Tensor& maskable, const std::optional<Tensor>& minimum,
                                       const std::optional<Tensor>& bound, const std::optional<Tensor>& active,
                                       int64_t least, double limit, int64_t policy) {
  const OnDeviceOf device(canvas);
  return commit_op(token, ranking, canvas, maskable, minimum, bound, active, least, limit, policy,
                   [&](const auto& arguments, int64_t batch) {
                     commit_kernel<<<batch, kThreads, 0, device.stream()>>>(arguments);
                     check_launch("commit");
                   });
}

}  // namespace
}  // namespace condgen_fast::refinement

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CUDA, m) {
  m.impl("remask", TORCH_BOX(&condgen_fast::refinement::remask_cuda));
  m.impl("commit", TORCH_BOX(&condgen_fast::refinement::commit_cuda));
}
