// Launches of beam_update and beam_hypotheses on a GPU.
#include "beam_update_tensors.h"
#include "common/cuda_utils.cuh"
#include "warp.cuh"

namespace condgen_fast::beam_search {
namespace {

void beam_update_cuda(const Tensor& ranks, const Tensor& sums, const Tensor& parents, const Tensor& tokens,
                      const std::vector<Tensor>& state, const std::vector<Tensor>& constants,
                      const std::vector<int64_t>& rules) {
  const Update update = checked_update(ranks, sums, parents, tokens, state, constants, rules);
  if (update.rows == 0) return;
  const OnDeviceOf device(tokens);
  beam_update_kernel<<<update.rows, kWarpSize, 0, device.stream()>>>(update);
  check_launch("beam_update");
}

std::tuple<Tensor, Tensor, Tensor> beam_hypotheses_cuda(const Tensor& finished, const Tensor& sums,
                                                        const Tensor& tokens, const Tensor& parents,
                                                        const Tensor& totals, const Tensor& ends, int64_t pad_id) {
  return beam_hypotheses_op(finished, sums, tokens, parents, totals, ends, pad_id, [&](const Finished& f) {
    const OnDeviceOf device(tokens);
    beam_hypotheses_kernel<<<ceil_div<int64_t>(f.batch * f.count, kWarpSize), kWarpSize, 0, device.stream()>>>(f);
    check_launch("beam_hypotheses");
  });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CUDA, m) {
  m.impl("beam_update", TORCH_BOX(&condgen_fast::beam_search::beam_update_cuda));
  m.impl("beam_hypotheses", TORCH_BOX(&condgen_fast::beam_search::beam_hypotheses_cuda));
}
