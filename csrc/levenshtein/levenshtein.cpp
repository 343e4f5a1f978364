// Schemas of the levenshtein family, and its CPU ops: they split the rows over threads and refuse bad ones.
#include "levenshtein/levenshtein.h"

#include <mutex>

#include "common/check.h"
#include "common/parallel.h"
#include "levenshtein/levenshtein_tensors.h"

namespace condgen_fast::levenshtein {

namespace {

// Runs kernel(begin, end) on ranges of rows; tokens is the number of tokens in a row.
template <class Kernel>
BadRows over_rows(int64_t rows, int64_t tokens, const Kernel& kernel) {
  constexpr int64_t kWorkPerToken = 4;
  BadRows bad;
  std::mutex mutex;
  parallel_for(rows, kWorkPerToken * tokens, [&](int64_t begin, int64_t end) {
    const BadRows found = kernel(begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    bad.padded_first = std::min(bad.padded_first, found.padded_first);
    bad.padded_second = std::min(bad.padded_second, found.padded_second);
    bad.other = std::min(bad.other, found.other);
  });
  return bad;
}

template <class Id>
void refuse_padding(int64_t row, const Id* tokens, int64_t width, int64_t pad_id, const char* name) {
  if (row == kNoRow) return;
  const Id* first = tokens + row * width;
  fail(name, " must be right-padded; got pad_id ", pad_id, " before a token in row ", row, ", position ",
       std::find(first, first + width, static_cast<Id>(pad_id)) - first);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_oracle_cpu(const Tensor& tokens, const Tensor& target, int64_t pad_id,
                                                           bool source_slots) {
  return edit_oracle_op(tokens, target, pad_id, source_slots, [](const auto& arguments, int64_t batch) {
    const int64_t row_tokens = arguments.width + arguments.other_width;
    const BadRows bad = over_rows(batch, row_tokens, [&](int64_t begin, int64_t end) {
      return CONDGEN_FAST_CPU_CALL(edit_oracle, arguments, begin, end);
    });
    refuse_padding(bad.padded_first, arguments.tokens, arguments.width, arguments.pad_id, "tokens");
    refuse_padding(bad.padded_second, arguments.target, arguments.other_width, arguments.pad_id, "target");
    if (bad.other == kNoRow) return;
    fail("target must need no insertion before the first or after the last ",
         arguments.source_slots ? "source" : "kept", " token; got one in row ", bad.other,
         " (let tokens and target share bos and eos)");
  });
}

Tensor edit_distance_cpu(const Tensor& a, const Tensor& b, int64_t pad_id, bool substitution, bool all_pairs) {
  return edit_distance_op(a, b, pad_id, substitution, all_pairs, [](const auto& arguments, int64_t pairs) {
    const int64_t pair_tokens = arguments.width + arguments.other_width;
    const BadRows bad = over_rows(pairs, pair_tokens, [&](int64_t begin, int64_t end) {
      return CONDGEN_FAST_CPU_CALL(edit_distance, arguments, begin, end);
    });
    int64_t row_of_a = bad.padded_first, row_of_b = bad.padded_second;  // pairs so far
    if (arguments.others > 0 && row_of_a != kNoRow) row_of_a /= arguments.others;
    if (arguments.others > 0 && row_of_b != kNoRow) row_of_b %= arguments.others;
    refuse_padding(row_of_a, arguments.a, arguments.width, arguments.pad_id, "a");
    refuse_padding(row_of_b, arguments.b, arguments.other_width, arguments.pad_id, "b");
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_alignment_cpu(const Tensor& tokens, const Tensor& target,
                                                              int64_t pad_id, int64_t gap_id) {
  return edit_alignment_op(tokens, target, pad_id, gap_id, [](const auto& arguments, int64_t batch) {
    const int64_t row_tokens = arguments.width + arguments.other_width;
    const BadRows bad = over_rows(batch, 4 * row_tokens, [&](int64_t begin, int64_t end) {
      return CONDGEN_FAST_CPU_CALL(edit_alignment, arguments, begin, end);
    });
    refuse_padding(bad.padded_first, arguments.tokens, arguments.width, arguments.pad_id, "tokens");
    refuse_padding(bad.padded_second, arguments.target, arguments.other_width, arguments.pad_id, "target");
  });
}

Tensor random_noise_cpu(const Tensor& tokens, const Tensor& seed, int64_t kind, int64_t pad_id, int64_t bos_id,
                        int64_t eos_id, int64_t mask_id, int64_t distance) {
  auto run = [](const auto& arguments, int64_t batch) {
    const BadRows bad = over_rows(batch, 4 * arguments.width, [&](int64_t begin, int64_t end) {
      return CONDGEN_FAST_CPU_CALL(random_noise, arguments, begin, end);
    });
    refuse_padding(bad.padded_first, arguments.tokens, arguments.width, arguments.pad_id, "tokens");
  };
  return random_noise_op(tokens, seed, kind, pad_id, bos_id, eos_id, mask_id, distance, run);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> apply_edits_cpu(
    const Tensor& tokens, const std::optional<Tensor>& delete_labels, const std::optional<Tensor>& insert,
    const std::optional<Tensor>& fill, const std::optional<Tensor>& scores, int64_t pad_id, int64_t bos_id,
    int64_t eos_id, int64_t mask_id, int64_t width, const std::optional<Tensor>& bounds) {
  auto run = [](const auto& arguments, int64_t batch) {
    const int64_t row_tokens = arguments.width + arguments.out_width;
    const BadRows bad = over_rows(batch, row_tokens, [&](int64_t begin, int64_t end) {
      return CONDGEN_FAST_CPU_CALL(apply_edits, arguments, begin, end);
    });
    refuse_padding(bad.padded_first, arguments.tokens, arguments.width, arguments.pad_id, "tokens");
    if (bad.other == kNoRow) return;
    const int64_t slots = arguments.width - 1;
    const int64_t* counts = arguments.insert + bad.other * slots;
    const int64_t slot = std::find_if(counts, counts + slots, [](int64_t count) { return count < 0; }) - counts;
    fail("insert must not be negative; got ", counts[slot], " in row ", bad.other, ", slot ", slot);
  };
  return apply_edits_op(tokens, delete_labels, insert, fill, scores, pad_id, bos_id, eos_id, mask_id, width, bounds,
                        run);
}

}  // namespace
}  // namespace condgen_fast::levenshtein

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def("edit_oracle(Tensor tokens, Tensor target, int pad_id, bool source_slots) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_distance(Tensor a, Tensor b, int pad_id, bool substitution, bool all_pairs=False) -> Tensor");
  m.def("edit_alignment(Tensor tokens, Tensor target, int pad_id, int gap_id) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "random_noise(Tensor tokens, Tensor seed, int kind, int pad_id, int bos_id, int eos_id, int mask_id, int "
      "distance) "
      "-> Tensor");
  m.def(
      "apply_edits(Tensor tokens, Tensor? delete, Tensor? insert, Tensor? fill, Tensor? scores, int pad_id, "
      "int bos_id, int eos_id, int mask_id, SymInt width, Tensor? bounds=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("edit_oracle", TORCH_BOX(&condgen_fast::levenshtein::edit_oracle_cpu));
  m.impl("edit_distance", TORCH_BOX(&condgen_fast::levenshtein::edit_distance_cpu));
  m.impl("edit_alignment", TORCH_BOX(&condgen_fast::levenshtein::edit_alignment_cpu));
  m.impl("random_noise", TORCH_BOX(&condgen_fast::levenshtein::random_noise_cpu));
  m.impl("apply_edits", TORCH_BOX(&condgen_fast::levenshtein::apply_edits_cpu));
}
