#include "levenshtein/bit_parallel.h"
#include "levenshtein/lanes.h"
#include "levenshtein/levenshtein.h"
#include "levenshtein/rows.h"

namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA {

namespace {

// One pair of any length and any ids at a time.
template <class Id>
class AnyLength {
 public:
  int64_t distance(const DistanceArguments<Id>& arguments, int64_t pair, BadRows& bad) {
    const Id* x = arguments.first_row(pair);
    const Id* y = arguments.second_row(pair);
    const Extent extent_x = extent(x, arguments.width, arguments.pad_id);
    const Extent extent_y = extent(y, arguments.other_width, arguments.pad_id);
    if (extent_x.padded) lower(bad.padded_first, pair);
    if (extent_y.padded) lower(bad.padded_second, pair);
    if (extent_x.padded || extent_y.padded) return 0;

    int64_t m = extent_x.length, n = extent_y.length;
    const int64_t prefix = common_prefix(x, m, y, n);
    x += prefix, y += prefix, m -= prefix, n -= prefix;
    while (m > 0 && n > 0 && x[m - 1] == y[n - 1]) --m, --n;
    if (m > n) {  // the longer one fills the words of bits better
      std::swap(x, y);
      std::swap(m, n);
    }
    if (m == 0) return n;
    if (arguments.substitution) return unit_cost_.template run<false>(x, m, y, n);
    return m + n - 2 * lcs_.template run<false>(x, m, y, n);
  }

 private:
  LongLcs<Id> lcs_;
  UnitCost<Id> unit_cost_;
};

}  // namespace

template <class Id>
BadRows edit_distance(const DistanceArguments<Id>& arguments, int64_t begin, int64_t end) {
  BadRows bad;
  AnyLength<Id> any_length;
  const bool done = in_groups(arguments, begin, end, [&](auto& group, int64_t first, int lanes, const bool* fits) {
    int64_t distances[kLanes];
    if (arguments.substitution) {
      group.unit_cost_distances(distances);
    } else {
      group.indel_distances(distances);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      arguments.distance[first + lane] =
          fits[lane] ? distances[lane] : any_length.distance(arguments, first + lane, bad);
    }
  });
  if (!done) {
    for (int64_t pair = begin; pair < end; ++pair) {
      arguments.distance[pair] = any_length.distance(arguments, pair, bad);
    }
  }
  return bad;
}

template BadRows edit_distance(const DistanceArguments<int32_t>&, int64_t, int64_t);
template BadRows edit_distance(const DistanceArguments<int64_t>&, int64_t, int64_t);

}  // namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA
