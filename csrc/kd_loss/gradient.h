// The gradient of a row from the powers of the first sweep, block by block.
#pragma once

#include <vector>

#include "row.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {

// A row of the gradient that is still to be written, from the powers in `scratch`. It may lie where the student's
// logits are: they are not read any more.
template <class Real>
struct Gradient {
  RowOfLogits row;
  bool stream;  // write past the caches
  bool with_w = false;
  Hard hard = Hard::kNone;
  std::vector<GradientFactors<Real>> factors;  // of blocks

  // Entries that are not as the last sweep writes them
  int64_t label = -1;
  double at_label = 0;                             // its entry
  const int64_t* ids = nullptr;                    // listed tokens, or null
  const Real* listed = nullptr;                    // their probabilities
  Real per_probability = 0;                        // what such a probability adds to the entry
  Real constant = 0;                               // of an entry without floor
  std::vector<int64_t> first_listed, next_listed;  // of a block, and after another in it; -1: none

  void list(const int64_t* tokens, const Real* probabilities, int64_t k) {
    ids = tokens;
    listed = probabilities;
    first_listed.assign(factors.size(), -1);
    next_listed.resize(k);
    for (int64_t j = 0; j < k; ++j) {
      int64_t& first = first_listed[ids[j] / kBlock];
      next_listed[j] = first;
      first = j;
    }
  }

  void write_block(Scratch<Real>& scratch, int64_t begin) const {
    row.with<Real>([&](auto* entries) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(entries)>>;
      S* to = const_cast<S*>(entries) + begin;
      const int64_t count = std::min(kBlock, row.width - begin);
      S* block = stream ? scratch.gradient_block.template as<S>() : to;
      const GradientFactors<Real>& f = factors[begin / kBlock];
      // w of tokens that a later block makes impossible may be infinite: its factor is 0 then
      write_gradient(with_w && f.w != 0, hard, scratch.at(begin), count, f, block);
      write_exceptions(scratch.at(begin), begin, count, block);
      if (stream) simd::stream(to, block, count * sizeof(S));
    });
  }

 private:
  template <class S>
  void write_exceptions(const Powers<Real>& powers, int64_t begin, int64_t count, S* block) const {
    const GradientFactors<Real>& f = factors[begin / kBlock];
    for (int64_t j = ids ? first_listed[begin / kBlock] : -1; j >= 0; j = next_listed[j]) {
      const int64_t i = ids[j] - begin;
      const Real e = powers.e[i], h = hard == Hard::kSeparate ? powers.h[i] : Real(0);
      block[i] = from_real<S>((f.e_e * e + f.e) * e + f.h * h + constant + per_probability * listed[j]);
    }
    if (label >= begin && label < begin + count) block[label - begin] = from_real<S>(static_cast<Real>(at_label));
  }
};

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
