#include "levenshtein/levenshtein.h"
#include "levenshtein/noise.h"
#include "levenshtein/rows.h"

namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA {

template <class Id>
BadRows random_noise(const NoiseArguments<Id>& arguments, int64_t begin, int64_t end) {
  BadRows bad;
  for (int64_t b = begin; b < end; ++b) {
    const Extent row = extent(arguments.tokens + b * arguments.width, arguments.width, arguments.pad_id);
    if (row.padded) lower(bad.padded_first, b);
    add_noise(arguments, b, row.length);
  }
  return bad;
}

template BadRows random_noise(const NoiseArguments<int32_t>&, int64_t, int64_t);
template BadRows random_noise(const NoiseArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA
