#include <algorithm>
#include <cstring>

#include "levenshtein/bit_parallel.h"
#include "levenshtein/levenshtein.h"
#include "levenshtein/rows.h"

namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA {

template <class Id>
BadRows edit_alignment(const AlignmentArguments<Id>& arguments, int64_t begin, int64_t end) {
  UnitCost<Id> unit_cost;
  BadRows bad;
  const auto gap = static_cast<Id>(arguments.gap_id);
  const int64_t out_width = arguments.width + arguments.other_width;
  for (int64_t b = begin; b < end; ++b) {
    const Id* x = arguments.tokens + b * arguments.width;
    const Id* y = arguments.target + b * arguments.other_width;
    const Extent extent_x = extent(x, arguments.width, arguments.pad_id);
    const Extent extent_y = extent(y, arguments.other_width, arguments.pad_id);
    if (extent_x.padded) lower(bad.padded_first, b);
    if (extent_y.padded) lower(bad.padded_second, b);
    if (extent_x.padded || extent_y.padded) continue;

    Id* out_x = arguments.aligned_tokens + b * out_width;
    Id* out_y = arguments.aligned_target + b * out_width;
    Id *end_x = out_x + out_width, *end_y = out_y + out_width;
    int64_t m = extent_x.length, n = extent_y.length, steps = 0;
    // Only the suffix may be cut: equal last tokens are always paired, equal first ones are not.
    for (; m > 0 && n > 0 && x[m - 1] == y[n - 1]; --m, --n, ++steps) *--end_x = *--end_y = x[m - 1];
    const bool table = m > 0 && n > 0;
    arguments.distance[b] = table ? unit_cost.template run<true>(x, m, y, n) : m + n;
    auto d0 = unit_cost.d0(table ? m : 1), vn = unit_cost.vn(table ? m - 1 : 0);
    steps += trace_alignment(d0, vn, x, m, y, n, gap, end_x, end_y);
    arguments.lengths[b] = steps;
    for (Id* row : {out_x, out_y}) {
      std::memmove(row, row + out_width - steps, sizeof(Id) * steps);
      std::fill(row + steps, row + out_width, static_cast<Id>(arguments.pad_id));
    }
  }
  return bad;
}

template BadRows edit_alignment(const AlignmentArguments<int32_t>&, int64_t, int64_t);
template BadRows edit_alignment(const AlignmentArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA
