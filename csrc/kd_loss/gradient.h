// The gradient of a row from the powers of the first sweep.
#pragma once

#include "row.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {

// Entries that are not as the last sweep writes them
template <class Real>
struct Exceptions {
  int64_t label = -1;
  double at_label = 0;  // its entry
  // Listed tokens; `ids` is null without
  const int64_t* ids = nullptr;
  const Real* listed = nullptr;  // their probabilities
  int64_t k = 0;
  Real per_probability = 0;  // what such a probability adds to the entry
  Real constant = 0;         // of an entry without floor
};

// Groups the listed tokens by block.
template <class Real>
void sort_by_block(const Exceptions<Real>& exceptions, Scratch<Real>& scratch) {
  std::fill(scratch.first_listed.begin(), scratch.first_listed.end(), -1);
  scratch.next_listed.resize(exceptions.k);
  for (int64_t j = 0; j < exceptions.k; ++j) {
    int64_t& first = scratch.first_listed[exceptions.ids[j] / kBlock];
    scratch.next_listed[j] = first;
    first = j;
  }
}

// Writes the row to `gradient`, where the student's logits may lie: they are not read any more.
template <class Real, class S, class FactorsOf>
void write_row(Sweep<Real>& sweep, bool with_w, Hard hard, const FactorsOf& factors_of,
               const Exceptions<Real>& exceptions, bool stream, S* gradient) {
  constexpr int64_t kAhead = 8 * kBlock;  // so much of the next row is fetched meanwhile
  Scratch<Real>& scratch = sweep.scratch;
  const int64_t width = sweep.student.width;
  if (exceptions.ids) sort_by_block(exceptions, scratch);
  for (int64_t begin = 0; begin < width; begin += kBlock) {
    const int64_t count = std::min(kBlock, width - begin);
    const Powers<Real> powers = scratch.at(begin);
    const GradientFactors<Real> factors = factors_of(scratch.blocks[begin / kBlock]);
    const Ahead here{reinterpret_cast<const char*>(powers.e), 0};
    const bool ahead = begin < kAhead;
    S* block = stream ? reinterpret_cast<S*>(scratch.gradient_block.data()) : gradient + begin;
    write_gradient(with_w, hard, powers, count, factors, ahead ? sweep.next_student.ahead(begin) : here,
                   ahead && sweep.teacher ? sweep.teacher->next.ahead(begin) : here, block);
    if (exceptions.ids) {
      for (int64_t j = scratch.first_listed[begin / kBlock]; j >= 0; j = scratch.next_listed[j]) {
        const int64_t i = exceptions.ids[j] - begin;
        const Real e = powers.e[i], h = hard == Hard::kSeparate ? powers.h[i] : Real(0);
        const Real p_part = (factors.e_e * e + factors.e) * e + factors.h * h;
        block[i] = from_real<S>(p_part + exceptions.constant + exceptions.per_probability * exceptions.listed[j]);
      }
    }
    if (exceptions.label >= begin && exceptions.label < begin + count) {
      block[exceptions.label - begin] = from_real<S>(static_cast<Real>(exceptions.at_label));
    }
    if (stream) simd::stream(gradient + begin, block, count * sizeof(S));
  }
}

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
