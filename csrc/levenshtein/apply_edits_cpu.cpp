#include <algorithm>

#include "levenshtein/levenshtein.h"
#include "levenshtein/rows.h"

namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA {

template <class Id, class Score>
BadRows apply_edits(const ApplyArguments<Id, Score>& arguments, int64_t begin, int64_t end) {
  BadRows bad;
  const int64_t width = arguments.width, out_width = arguments.out_width;
  const int64_t slot_width = width > 0 ? width - 1 : 0;
  for (int64_t b = begin; b < end; ++b) {
    const Id* row = arguments.tokens + b * width;
    const bool* deleted = arguments.delete_labels == nullptr ? nullptr : arguments.delete_labels + b * width;
    const int64_t* counts = arguments.insert == nullptr ? nullptr : arguments.insert + b * slot_width;
    const Id* fill = arguments.fill == nullptr ? nullptr : arguments.fill + b * out_width;
    const Score* scores = arguments.scores == nullptr ? nullptr : arguments.scores + b * width;
    Id* out = arguments.out_tokens + b * out_width;
    // not by `scores`: the data of an empty tensor is null as well
    Score* out_scores = arguments.out_scores == nullptr ? nullptr : arguments.out_scores + b * out_width;
    int64_t* origin = arguments.origin + b * out_width;

    const Extent row_extent = extent(row, width, arguments.pad_id);
    if (row_extent.padded) lower(bad.padded_first, b);
    auto stays = [&](int64_t i) {
      return deleted == nullptr || !deleted[i] || row[i] == arguments.bos_id || row[i] == arguments.eos_id;
    };
    int64_t kept = 0;
    for (int64_t i = 0; i < row_extent.length; ++i) kept += stays(i);
    for (int64_t slot = 0; counts != nullptr && slot + 1 < kept; ++slot) {
      if (counts[slot] < 0) lower(bad.other, b);
    }

    const int64_t bound = arguments.bounds == nullptr ? out_width : std::min(arguments.bounds[b], out_width);
    int64_t room = std::max<int64_t>(bound - kept, 0);
    int64_t rank = 0, length = 0;
    auto append = [&](Id token, Score score, int64_t from) {
      out[length] = fill != nullptr && token == arguments.mask_id ? fill[length] : token;
      if (out_scores != nullptr) out_scores[length] = score;
      origin[length++] = from;
    };
    for (int64_t i = 0; i < row_extent.length; ++i) {
      if (!stays(i)) continue;
      ++rank;
      if (kept > out_width && rank >= out_width && (rank < kept || out_width == 0)) continue;  // the last one stays
      append(row[i], scores == nullptr ? Score{0} : scores[i], i);
      if (counts == nullptr || rank == kept) continue;
      const int64_t count = counts[rank - 1] < room ? counts[rank - 1] : room;
      for (int64_t k = 0; k < count; ++k) append(static_cast<Id>(arguments.mask_id), Score{0}, -1);
      if (count > 0) room -= count;
    }
    arguments.lengths[b] = length;
    for (int64_t k = length; k < out_width; ++k) {
      out[k] = static_cast<Id>(arguments.pad_id);
      if (out_scores != nullptr) out_scores[k] = Score{0};
      origin[k] = -1;
    }
  }
  return bad;
}

#define INSTANTIATE(Id)                                                                              \
  template BadRows apply_edits<Id, uint16_t>(const ApplyArguments<Id, uint16_t>&, int64_t, int64_t); \
  template BadRows apply_edits<Id, uint32_t>(const ApplyArguments<Id, uint32_t>&, int64_t, int64_t); \
  template BadRows apply_edits<Id, uint64_t>(const ApplyArguments<Id, uint64_t>&, int64_t, int64_t);
INSTANTIATE(int32_t)
INSTANTIATE(int64_t)
#undef INSTANTIATE

}  // namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA
