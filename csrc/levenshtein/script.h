// A script as two bit maps, and the labels it means. Bit i of kept_x (bit j of kept_y) is one where x[i] (y[j]) stays;
// the other tokens of x are deleted, those of y inserted. The k-th token kept in x is the k-th kept in y.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__BMI2__)
#include <immintrin.h>
#endif

// Unnamed on purpose: the including file is compiled once per instruction set, and no copy may stand in for another.
namespace {

// out[i] = whether bit i is not set in `kept`, for i < length; false from there to width.
inline void write_missing(const uint64_t* kept, int64_t length, int64_t width, bool* out) {
  for (int64_t base = 0; base < width; base += 64) {
    const int64_t tokens = length - base;
    const uint64_t used = tokens <= 0 ? 0 : tokens >= 64 ? ~uint64_t{0} : (uint64_t{1} << tokens) - 1;
    const uint64_t missing = used == 0 ? 0 : ~kept[base / 64] & used;
#if defined(__AVX512BW__)
    const uint64_t there = width - base >= 64 ? ~uint64_t{0} : (uint64_t{1} << (width - base)) - 1;
    _mm512_mask_storeu_epi8(out + base, there, _mm512_maskz_set1_epi8(missing, 1));
#else
    for (int64_t part = 0; part < 64 && base + part < width; part += 8) {
      const uint64_t eight = (missing >> part) & 0xFF;
#if defined(__BMI2__)
      const uint64_t bytes = _pdep_u64(eight, 0x0101010101010101u);
#else
      // Each bit is moved to the top of its own byte, then down; seven copies cannot meet in a carry.
      const uint64_t bytes = (((eight & 0x7F) * 0x0002040810204081u) & 0x0101010101010101u) | (eight >> 7 << 56);
#endif
      const int64_t rest = width - base - part;
      std::memcpy(out + base + part, &bytes, rest < 8 ? rest : 8);
    }
#endif
  }
}

// Where an insertion goes that stands between two kept tokens of x, the latter the first one kept behind `slot`.
struct KeptSource {
  const uint64_t* kept_x;
  int64_t rank = -1;      // of the kept token at `position`
  int64_t position = -1;  // in x
  // The position of the kept token of this rank; ranks must not fall from call to call.
  int64_t find(int64_t wanted) {
    while (rank < wanted) {
      ++position;
      rank += (kept_x[position / 64] >> (position % 64)) & 1;
    }
    return position;
  }
};

// Counts the insertions in their slots; false if one has no slot. kept: how many tokens are kept.
// "source": an insertion stands right before the next kept token of x, behind what is deleted there.
inline bool write_insertions(const uint64_t* kept_x, int64_t m, const uint64_t* kept_y, int64_t n, int64_t kept,
                             bool source_slots, int64_t slot_width, int64_t* insert) {
  if (slot_width > 0) std::memset(insert, 0, 8 * slot_width);
  bool inside = true;
  KeptSource source{kept_x};
  int64_t missing_before = 0;
  for (int64_t base = 0; base < n; base += 64) {
    const uint64_t used = n - base >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - base)) - 1;
    uint64_t missing = ~kept_y[base / 64] & used;
    while (missing != 0) {  // a run of inserted tokens, or what of it lies in this word
      const int64_t from = __builtin_ctzll(missing);
      const uint64_t behind = ~(missing >> from);
      const int64_t run = behind == 0 ? 64 : __builtin_ctzll(behind);
      const int64_t rank = base + from - missing_before;  // kept tokens in front
      missing_before += run;
      missing &= run == 64 ? 0 : ~(((uint64_t{1} << run) - 1) << from);
      const int64_t slot = (rank == kept ? m : source_slots ? source.find(rank) : rank) - 1;
      if (slot < 0 || rank == kept) {
        inside = false;
      } else {
        insert[slot] += run;
      }
    }
  }
  return inside;
}

}  // namespace
