// Schema of beam_topk, and its CPU op: which thread sweeps which blocks.
#include "beam_search.h"

#include <algorithm>
#include <memory>

#include "beam_search_tensors.h"
#include "common/parallel.h"

namespace condgen_fast::beam_search {
namespace {

constexpr int64_t kSentencesPerThread = 8;  // from here on a thread sweeps and selects whole sentences

class BlocksBuffer : public Blocks {
 public:
  BlocksBuffer(int64_t rows, int64_t blocks_per_row)
      : doubles_(std::make_unique_for_overwrite<double[]>(rows * blocks_per_row * 2)),
        floats_(std::make_unique_for_overwrite<float[]>(rows * blocks_per_row * (kColumns + 1))) {
    const int64_t count = rows * blocks_per_row;
    sums = doubles_.get();
    shifts = sums + count;
    columns = floats_.get();
    highest = columns + count * kColumns;
    per_row = blocks_per_row;
  }

 private:
  std::unique_ptr<double[]> doubles_;
  std::unique_ptr<float[]> floats_;
};

template <class Logit>
void beam_topk(const Arguments<Logit>& arguments, int64_t batch) {
  const int64_t beams = arguments.beams, vocab = arguments.vocab;
  const int64_t blocks_of_row = (vocab + kBlock - 1) / kBlock, blocks_of_sentence = beams * blocks_of_row;
  const int64_t select_work = beams * (blocks_of_row * kColumns / 8 + arguments.adjustments) + 16 * arguments.k;
  if (thread_count() == 1 || batch >= kSentencesPerThread * thread_count()) {
    // a sentence at a time, so that the logits to select from are still in the cache
    parallel_for(batch, beams * vocab / 4 + select_work, [&](int64_t begin, int64_t end) {
      const BlocksBuffer blocks(beams, blocks_of_row);
      for (int64_t b = begin; b < end; ++b) {
        CONDGEN_FAST_CPU_CALL(sweep, arguments, blocks, b * beams, b * blocks_of_sentence,
                              (b + 1) * blocks_of_sentence);
        CONDGEN_FAST_CPU_CALL(select, arguments, blocks, b * beams, b, b + 1);
      }
    });
    return;
  }
  const BlocksBuffer blocks(batch * beams, blocks_of_row);
  parallel_for(batch * blocks_of_sentence, std::min(vocab, kBlock) / 4,
               [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(sweep, arguments, blocks, 0, begin, end); });
  parallel_for(batch, select_work,
               [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(select, arguments, blocks, 0, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> beam_topk_cpu(const Tensor& logits, const Tensor& scores, int64_t k,
                                                 double temperature, const std::optional<Tensor>& adjusted,
                                                 const std::optional<Tensor>& amounts,
                                                 const std::optional<Tensor>& allowed,
                                                 const std::optional<Tensor>& first,
                                                 const std::optional<Tensor>& last) {
  return beam_topk_op<simd::Half, simd::BFloat16>(
      logits, scores, k, temperature, {adjusted, amounts, allowed, first, last},
      [&](const auto& arguments, int64_t batch) {
        const int64_t count = arguments.first == nullptr ? 0 : batch * arguments.beams;
        const int64_t most = count == 0 ? 0 : *std::max_element(arguments.last, arguments.last + count);
        CONDGEN_FAST_CHECK(count == 0 || most <= allowed->numel(),
                           "allowed.last must be at most E = ", allowed->numel(), "; got ", most);
        beam_topk(arguments, batch);
      });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def(
      "beam_topk(Tensor logits, Tensor scores, SymInt k, float temperature, Tensor? adjusted=None, "
      "Tensor? amounts=None, Tensor? allowed=None, Tensor? first=None, Tensor? last=None) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("beam_topk", TORCH_BOX(&condgen_fast::beam_search::beam_topk_cpu));
}
