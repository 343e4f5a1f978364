// Schemas of beam_update and beam_hypotheses, and their CPU ops: a sentence's work is short, so few are worth a thread.
#include "beam_update.h"

#include "beam_update_tensors.h"
#include "common/parallel.h"

namespace condgen_fast::beam_search {
namespace {

// What a GPU takes for the nearest that is possible.
void check_values(const Update& u) {
  const auto check = [](const char* name, const int64_t* values, int64_t count, int64_t size) {
    for (int64_t i = 0; i < count; ++i) {
      CONDGEN_FAST_CHECK(values[i] >= 0 && values[i] < size, name, " must be in [0, ", size, "); got ", values[i]);
    }
  };
  check("parents", u.found_parents, u.rows * u.groups * u.candidates, u.beams);
  check("sentences[0]", u.sentences, u.rows, u.batch);
  check("sentences[1]", u.sentences + u.rows, u.rows, u.steps + 2);
  check("sentences[2]", u.sentences + 2 * u.rows, u.rows, u.steps + 1);
  if (u.nodes_wanted) {
    for (int64_t i = 0; i < u.rows * u.beams; ++i) {
      CONDGEN_FAST_CHECK(u.nodes[i] < u.rules.trie_nodes, "nodes must be below ", u.rules.trie_nodes, "; got ",
                         u.nodes[i]);
    }
  }
}

void beam_update_cpu(const Tensor& ranks, const Tensor& sums, const Tensor& parents, const Tensor& tokens,
                     const std::vector<Tensor>& state, const std::vector<Tensor>& constants,
                     const std::vector<int64_t>& rules) {
  const Update update = checked_update(ranks, sums, parents, tokens, state, constants, rules);
  check_values(update);
  const int64_t of_beam = 8 + update.history_width * (2 + update.rules.no_repeat_ngram);
  const int64_t work = 8 * update.groups * (update.candidates + update.capacity) + update.beams * of_beam;
  parallel_for(update.rows, work, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) Sentence<Alone>(update, row, Alone{}).update();
  });
}

std::tuple<Tensor, Tensor, Tensor> beam_hypotheses_cpu(const Tensor& finished, const Tensor& sums, const Tensor& tokens,
                                                       const Tensor& parents, const Tensor& totals, const Tensor& ends,
                                                       int64_t pad_id) {
  return beam_hypotheses_op(finished, sums, tokens, parents, totals, ends, pad_id, [](const Finished& f) {
    parallel_for(f.batch * f.count, 8 * f.steps, [&](int64_t begin, int64_t end) {
      for (int64_t hypothesis = begin; hypothesis < end; ++hypothesis) {
        CONDGEN_FAST_CHECK(trace_back(f, hypothesis), "finished must hold beams in [0, ", f.beams,
                           ") and lengths in [1, ", f.steps, "], parents beams");
      }
    });
  });
}

}  // namespace
}  // namespace condgen_fast::beam_search

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def(
      "beam_update(Tensor ranks, Tensor sums, Tensor parents, Tensor tokens, Tensor(a!)[] state, Tensor[] constants, "
      "int[] rules) -> ()");
  m.def(
      "beam_hypotheses(Tensor finished, Tensor sums, Tensor tokens, Tensor parents, Tensor totals, Tensor ends, "
      "int pad_id) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("beam_update", TORCH_BOX(&condgen_fast::beam_search::beam_update_cpu));
  m.impl("beam_hypotheses", TORCH_BOX(&condgen_fast::beam_search::beam_hypotheses_cpu));
}
