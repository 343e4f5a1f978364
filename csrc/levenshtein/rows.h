// What the CPU kernels ask of a padded row, and of a pair of rows.
#pragma once

#include <cstdint>

// Unnamed on purpose: the including file is compiled once per instruction set, and no copy may stand in for another.
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

inline void lower(int64_t& first, int64_t row) {
  if (row < first) first = row;
}

template <class Id>
int64_t common_prefix(const Id* x, int64_t m, const Id* y, int64_t n) {
  const int64_t shorter = m < n ? m : n;
  int64_t length = 0;
  while (length < shorter && x[length] == y[length]) ++length;
  return length;
}

}  // namespace
