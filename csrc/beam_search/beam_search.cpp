// Schema of beam_topk, and its CPU op: which rows are read, how they are cut for the threads.
#include "beam_search.h"

#include <cmath>
#include <vector>

#include "beam_search_tensors.h"
#include "common/parallel.h"

namespace condgen_fast::beam_search {
namespace {

constexpr int64_t kPiecesPerThread = 8;  // where rows are fewer they are cut, for threads to end at about the same time
constexpr int64_t kLeastBlocks = 4;      // of a piece; each starts its search for the best anew

template <class Logit>
void beam_topk(const Arguments<Logit>& arguments, int64_t batch) {
  const int64_t beams = arguments.beams, vocab = arguments.vocab;
  std::vector<int64_t> rows, row_of(batch * beams, -1);
  rows.reserve(batch * beams);
  for (int64_t row = 0; row < batch * beams && vocab > 0; ++row) {
    if (!std::isfinite(arguments.scores[row])) continue;
    row_of[row] = static_cast<int64_t>(rows.size());
    rows.push_back(row);
  }
  const int64_t row_count = static_cast<int64_t>(rows.size());
  const int64_t row_blocks = std::max<int64_t>(1, (vocab + kBlock - 1) / kBlock);
  const int64_t wanted = kPiecesPerThread * thread_count() / std::max<int64_t>(1, row_count);
  const int64_t cuts =
      thread_count() == 1 ? 1 : std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, row_blocks / kLeastBlocks));

  Pieces pieces;
  pieces.rows = rows.data();
  pieces.row_count = row_count;
  pieces.blocks = (row_blocks + cuts - 1) / cuts;
  pieces.per_row = (row_blocks + pieces.blocks - 1) / pieces.blocks;
  pieces.kept = std::min({arguments.k, vocab, pieces.blocks * kBlock});
  const int64_t count = row_count * pieces.per_row;
  std::vector<float> highest(count * pieces.blocks), sums(count * pieces.blocks);
  std::vector<Candidate> best(count * pieces.kept);
  std::vector<int64_t> found(count);
  pieces.highest = highest.data();
  pieces.sums = sums.data();
  pieces.best = best.data();
  pieces.found = found.data();

  parallel_for(count, std::min(vocab, pieces.blocks * kBlock),
               [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(scan, arguments, pieces, begin, end); });
  const int64_t merge_work = beams * (2 * row_blocks + pieces.per_row * pieces.kept) + arguments.k * beams;
  parallel_for(batch, merge_work, [&](int64_t begin, int64_t end) {
    CONDGEN_FAST_CPU_CALL(merge, arguments, pieces, row_of.data(), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> beam_topk_cpu(const Tensor& logits, const Tensor& scores, int64_t k,
                                                 double temperature) {
  return beam_topk_op<simd::Half, simd::BFloat16>(
      logits, scores, k, temperature, [](const auto& arguments, int64_t batch) { beam_topk(arguments, batch); });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def("beam_topk(Tensor logits, Tensor scores, SymInt k, float temperature) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("beam_topk", TORCH_BOX(&condgen_fast::beam_search::beam_topk_cpu));
}
