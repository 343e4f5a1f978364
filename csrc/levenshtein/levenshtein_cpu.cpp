#include "levenshtein/levenshtein.h"

#include "levenshtein/bit_parallel.h"

namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA {

namespace {

struct Extent {
  int64_t length;  // tokens before the padding at the end
  bool padded;     // there is padding among them
};

template <class Id>
Extent extent(const Id* row, int64_t width, int64_t pad_id) {
  int64_t length = width;
  while (length > 0 && row[length - 1] == pad_id) --length;
  bool padded = false;
  for (int64_t i = 0; i < length; ++i) padded |= row[i] == pad_id;
  return {length, padded};
}

template <class T>
void clear(T* row, int64_t size) {  // unlike memset, a null row of size 0 is fine
  for (int64_t i = 0; i < size; ++i) row[i] = 0;
}

void lower(int64_t& first, int64_t row) {
  if (row < first) first = row;
}

template <class Id>
int64_t common_prefix(const Id* x, int64_t m, const Id* y, int64_t n) {
  const int64_t shorter = m < n ? m : n;
  int64_t length = 0;
  while (length < shorter && x[length] == y[length]) ++length;
  return length;
}

template <class Id>
bool is_subsequence(const Id* x, int64_t m, const Id* y, int64_t n) {
  int64_t i = 0;
  for (int64_t j = 0; i < m && n - j >= m - i; ++j) i += x[i] == y[j];
  return i == m;
}

// For a subsequence the leftmost match is the script that the tie rule picks: every token is kept as early as can be.
template <class Id>
void label_subsequence(const Id* x, int64_t m, const Id* y, int64_t n, int64_t offset, LabelWriter& labels) {
  labels.kept -= m;
  int64_t i = 0, from = 0;
  for (int64_t j = 0; j < n && i < m; ++j) {
    if (x[i] != y[j]) continue;
    labels.insert(offset + i, offset + from, offset + j);
    from = j + 1;
    ++i;
    ++labels.kept;
  }
  labels.insert(offset + m, offset + from, offset + n);
}

}  // namespace

template <class Id>
BadRows edit_oracle(const OracleArguments<Id>& arguments, int64_t begin, int64_t end) {
  ShortLcs<Id> short_lcs;
  LongLcs<Id> long_lcs;
  BadRows bad;
  const int64_t width = arguments.width, target_width = arguments.target_width;
  const int64_t slot_width = width > 0 ? width - 1 : 0;
  for (int64_t b = begin; b < end; ++b) {
    LabelWriter labels{};
    labels.delete_row = arguments.delete_labels + b * width;
    labels.insert_row = arguments.insert + b * slot_width;
    labels.masked_row = arguments.masked + b * target_width;
    labels.source_slots = arguments.source_slots;
    clear(labels.delete_row, width);
    clear(labels.insert_row, slot_width);
    clear(labels.masked_row, target_width);
    arguments.distance[b] = 0;

    const Id* x = arguments.tokens + b * width;
    const Id* y = arguments.target + b * target_width;
    const Extent extent_x = extent(x, width, arguments.pad_id);
    const Extent extent_y = extent(y, target_width, arguments.pad_id);
    if (extent_x.padded) lower(bad.padded_first, b);
    if (extent_y.padded) lower(bad.padded_second, b);
    if (extent_x.padded || extent_y.padded) continue;

    // Only the prefix may be cut: the tie rule does not always match a common suffix with itself.
    const int64_t offset = common_prefix(x, extent_x.length, y, extent_y.length);
    const int64_t m = extent_x.length - offset, n = extent_y.length - offset;
    x += offset;
    y += offset;
    auto start = [&](int64_t common) {
      labels.kept = offset + common;
      labels.last_slot = (arguments.source_slots ? extent_x.length : labels.kept) - 1;
      arguments.distance[b] = m + n - 2 * common;
    };
    if (is_subsequence(x, m, y, n)) {
      start(m);
      label_subsequence(x, m, y, n, offset, labels);
    } else if (n <= 64) {
      start(short_lcs.run(x, m, y, n));
      trace_back(short_lcs, m, n, offset, labels);
    } else {
      start(long_lcs.template run<true>(x, m, y, n));
      trace_back(long_lcs, m, n, offset, labels);
    }
    if (labels.outside) lower(bad.other, b);
  }
  return bad;
}

template <class Id>
BadRows edit_distance(const DistanceArguments<Id>& arguments, int64_t begin, int64_t end) {
  LongLcs<Id> lcs;
  UnitCost<Id> unit_cost;
  BadRows bad;
  for (int64_t b = begin; b < end; ++b) {
    const Id* x = arguments.a + b * arguments.width;
    const Id* y = arguments.b + b * arguments.other_width;
    const Extent extent_x = extent(x, arguments.width, arguments.pad_id);
    const Extent extent_y = extent(y, arguments.other_width, arguments.pad_id);
    arguments.distance[b] = 0;
    if (extent_x.padded) lower(bad.padded_first, b);
    if (extent_y.padded) lower(bad.padded_second, b);
    if (extent_x.padded || extent_y.padded) continue;

    int64_t m = extent_x.length, n = extent_y.length;
    const int64_t prefix = common_prefix(x, m, y, n);
    x += prefix, y += prefix, m -= prefix, n -= prefix;
    while (m > 0 && n > 0 && x[m - 1] == y[n - 1]) --m, --n;
    if (m > n) {  // the longer one fills the words of bits better
      const Id* longer = x;
      x = y;
      y = longer;
      const int64_t length = m;
      m = n;
      n = length;
    }
    if (m == 0) {
      arguments.distance[b] = n;
    } else if (arguments.substitution) {
      arguments.distance[b] = unit_cost.run(x, m, y, n);
    } else {
      arguments.distance[b] = m + n - 2 * lcs.template run<false>(x, m, y, n);
    }
  }
  return bad;
}

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

    int64_t room = out_width > kept ? out_width - kept : 0;
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
  template BadRows edit_oracle<Id>(const OracleArguments<Id>&, int64_t, int64_t);                    \
  template BadRows edit_distance<Id>(const DistanceArguments<Id>&, int64_t, int64_t);                \
  template BadRows apply_edits<Id, uint16_t>(const ApplyArguments<Id, uint16_t>&, int64_t, int64_t); \
  template BadRows apply_edits<Id, uint32_t>(const ApplyArguments<Id, uint32_t>&, int64_t, int64_t); \
  template BadRows apply_edits<Id, uint64_t>(const ApplyArguments<Id, uint64_t>&, int64_t, int64_t);
INSTANTIATE(int32_t)
INSTANTIATE(int64_t)
#undef INSTANTIATE

}  // namespace condgen_fast::levenshtein::CONDGEN_FAST_ISA
