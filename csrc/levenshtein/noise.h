// Noise on one sentence, for CPU and CUDA alike: every draw is a hash of the seed, the row and the number of the draw,
// so the result depends on neither threads nor device.
#pragma once

#include "levenshtein/levenshtein.h"

// Unnamed on purpose: the including file is compiled once per instruction set, and no copy may stand in for another.
namespace {

using condgen_fast::levenshtein::Noise;
using condgen_fast::levenshtein::NoiseArguments;

// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
CONDGEN_FAST_HOST_DEVICE inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

class Draws {
 public:
  CONDGEN_FAST_HOST_DEVICE Draws(int64_t seed, int64_t row)
      : key_(mix(mix(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(row))) {}
  // The draw of this number, uniform in [0, 2^32).
  CONDGEN_FAST_HOST_DEVICE uint64_t operator()(int64_t number) const {
    return mix(key_ + 0x9E3779B97F4A7C15u * (static_cast<uint64_t>(number) + 1)) >> 32;
  }
  // The same scaled to [0, bound).
  CONDGEN_FAST_HOST_DEVICE int64_t below(int64_t number, int64_t bound) const {
    return static_cast<int64_t>((*this)(number) * static_cast<uint64_t>(bound) >> 32);
  }

 private:
  uint64_t key_;
};

// Deletes or masks a number of tokens uniform in 1 .. N of the N that are neither bos nor eos, any of them with the
// same chance (selection sampling: Knuth, The Art of Computer Programming 2, 3.4.2, algorithm S). Writes `width`
// tokens.
template <class Id>
CONDGEN_FAST_HOST_DEVICE inline void drop_tokens(const NoiseArguments<Id>& arguments, const Id* row, int64_t length,
                                                 const Draws& draws, Id* out) {
  auto special = [&](int64_t i) { return row[i] == arguments.bos_id || row[i] == arguments.eos_id; };
  int64_t left = 0;
  for (int64_t i = 0; i < length; ++i) left += !special(i);
  int64_t wanted = left == 0 ? 0 : 1 + draws.below(0, left);
  int64_t written = 0;
  for (int64_t i = 0; i < length; ++i) {
    bool dropped = false;
    if (!special(i)) {
      dropped = draws.below(1 + i, left) < wanted;
      --left;
      wanted -= dropped;
    }
    if (arguments.kind == Noise::kMask) {
      out[written++] = dropped ? static_cast<Id>(arguments.mask_id) : row[i];
    } else if (!dropped) {
      out[written++] = row[i];
    }
  }
  for (; written < arguments.width; ++written) out[written] = static_cast<Id>(arguments.pad_id);
}

// Permutes the tokens between a leading bos and a trailing eos: any permutation with the same chance, or, with a
// distance k, in the order of place + k' for k' uniform in [0, k + 1), so that no token moves farther than k
// (Lample et al. 2018, arXiv:1711.00043, section 2.3).
template <class Id>
CONDGEN_FAST_HOST_DEVICE inline void shuffle_tokens(const NoiseArguments<Id>& arguments, const Id* row, int64_t length,
                                                    const Draws& draws, Id* out) {
  for (int64_t i = 0; i < arguments.width; ++i) out[i] = row[i];
  const int64_t begin = length > 0 && row[0] == arguments.bos_id;
  const int64_t end = length > begin && row[length - 1] == arguments.eos_id ? length - 1 : length;
  const int64_t count = end - begin;
  if (arguments.distance < 0) {
    for (int64_t i = count - 1; i > 0; --i) {
      const int64_t other = draws.below(i, i + 1);
      const Id token = out[begin + i];
      out[begin + i] = out[begin + other];
      out[begin + other] = token;
    }
    return;
  }
  const auto range = static_cast<uint64_t>(arguments.distance + 1);
  auto key = [&](int64_t i) { return (static_cast<uint64_t>(i) << 32) + draws(i) * range; };
  const int64_t reach = arguments.distance < count ? arguments.distance : count;  // beyond it no key can pass another
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t own = key(i);
    int64_t place = i;
    for (int64_t j = i > reach ? i - reach : 0; j < i; ++j) place -= key(j) > own;
    for (int64_t j = i + 1; j < count && j <= i + reach; ++j) place += key(j) < own;
    out[begin + place] = row[begin + i];
  }
}

template <class Id>
CONDGEN_FAST_HOST_DEVICE inline void add_noise(const NoiseArguments<Id>& arguments, int64_t b, int64_t length) {
  const Draws draws(*arguments.seed, b);
  const Id* row = arguments.tokens + b * arguments.width;
  Id* out = arguments.out + b * arguments.width;
  if (arguments.kind == Noise::kShuffle) {
    shuffle_tokens(arguments, row, length, draws, out);
  } else {
    drop_tokens(arguments, row, length, draws, out);
  }
}

}  // namespace
