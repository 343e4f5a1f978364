// The loops of the kernel over a block of a row, 2048 logits at a time, so that what one loop leaves to the next is in
// the first-level cache.
//
// Exponents are in powers of two: z = (s - shift) / T * log2 e of the student, y of the teacher, so that e = 2^z, q =
// 2^y. Shifts are the highest logit up to and including the block: powers neither overflow nor vanish in a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kd_loss.h"
#include "reals.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {

constexpr int64_t kBlock = 2048;
constexpr double kLog2E = 1.4426950408889634;

// What a loop adds up in its lanes before the sums go on as doubles: a whole block, but 256 steps of float32 at most. A
// lane's rounding errors grow with its additions, and would where lanes are few.
template <class Real>
constexpr int64_t kRun = std::is_same_v<Real, float> ? std::min<int64_t>(256 * kStep<Real>, kBlock) : kBlock;

// Where the hard term's exponentials, those at temperature 1, come from
enum class Hard { kNone, kSame, kSquare, kSeparate };  // not needed; e (T is 1); e * e (T is 2); h

// What the powers of a block add up to
struct BlockSums {
  double e = 0, h = 0, q = 0;  // h: of the student at temperature 1
  double dot = 0;              // of the divergence: q * z, q * (y - z) or e * (z - y)
  double x = 0;                // s - shift, where there is no teacher
  double e_z = 0, q_y = 0;     // of the entropies

  BlockSums& operator+=(const BlockSums& other) {
    e += other.e, h += other.h, q += other.q, dot += other.dot, x += other.x, e_z += other.e_z, q_y += other.q_y;
    return *this;
  }
};

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

template <class Body>
auto with_hard(Hard hard, const Body& body) {
  switch (hard) {
    case Hard::kSame:
      return body(Constant<Hard::kSame>{});
    case Hard::kSquare:
      return body(Constant<Hard::kSquare>{});
    case Hard::kSeparate:
      return body(Constant<Hard::kSeparate>{});
    default:
      return body(Constant<Hard::kNone>{});
  }
}

// `count` logits as reals, -inf beyond them up to `padded`, a whole number of steps: in place where that is what they
// are, else in `buffer`. Raises `highest`, which ignores NaN.
template <class Real, class T>
const Real* read_block(const T* from, int64_t count, int64_t padded, Real* buffer, Real& highest) {
  constexpr int64_t step = kStep<Real>;
  Wide<Real> most(highest), more = most;
  int64_t i = 0;
  if constexpr (std::is_same_v<T, Real>) {
    if (count == padded) {
      for (; i + 2 * step <= count; i += 2 * step) {
        most = max(load(from + i), most);
        more = max(load(from + i + step), more);
      }
      if (i < count) most = max(load(from + i), most);
      highest = reduce_max(max(more, most));
      return from;
    }
  }
  for (; i + step <= count; i += step) {
    const Wide<Real> x = load(from + i);
    store(buffer + i, x);
    most = max(x, most);
  }
  if constexpr (step > 1) {
    if (i < count) {
      const Vec x = simd::load_first(from + i, count - i, -INFINITY);
      store(buffer + i, x);
      most = max(x, most);
      i += step;
    }
  }
  std::fill(buffer + i, buffer + std::max(i, padded), Real(-INFINITY));
  highest = reduce_max(most);
  return buffer;
}

template <class Real>
double sum_of(const Real* x, int64_t count, Real shift) {
  constexpr int64_t step = kStep<Real>;
  const Wide<Real> from(shift);
  Wide<Real> a(Real(0)), b = a, c = a, d = a;  // no addition waits for the one before
  int64_t i = 0;
  for (; i + 4 * step <= count; i += 4 * step) {
    a = a + (load(x + i) - from);
    b = b + (load(x + i + step) - from);
    c = c + (load(x + i + 2 * step) - from);
    d = d + (load(x + i + 3 * step) - from);
  }
  for (; i + step <= count; i += step) a = a + (load(x + i) - from);
  double total = reduce_sum((a + b) + (c + d));
  for (; i < count; ++i) total += x[i] - shift;
  return total;
}

// Where the next block is to be fetched from while this one is computed
struct Ahead {
  const char* from = nullptr;
  int64_t element = 0;  // bytes

  void fetch(int64_t i) const { __builtin_prefetch(from + i * element, 0, 2); }
  Ahead operator+(int64_t i) const { return {from + i * element, element}; }
};

template <class Real>
struct Exponents {
  const Real* logits;
  Real shift;
  Real factor;  // log2 e / temperature
  Ahead ahead;

  Exponents operator+(int64_t i) const { return {logits + i, shift, factor, ahead + i}; }
};

// kShort: exponentials that only a gradient of 16 bits is made of
enum class Detail { kPlain, kEntropies, kShort };

// Structures are handed to the loops by value: the compiler then knows that stores do not change them.

// The first sweep writes e and w, what else of a token its gradient needs: q where that is of p - q, jsd and tvd, and
// e * (z - y) for reverse_kl; and h of Hard::kSeparate.
template <class Real>
struct Powers {
  Real* e;
  Real* w;
  Real* h;

  Powers operator+(int64_t i) const { return {e + i, w + i, h + i}; }
};

// `count` is of whole steps.
template <bool kTeacher, Divergence kDivergence, Hard kHard, Detail kDetail, class Real>
BlockSums exponentials_of(Exponents<Real> student, Exponents<Real> teacher, int64_t count, Powers<Real> powers) {
  using V = Wide<Real>;
  constexpr bool kEntropies = kDetail == Detail::kEntropies;
  constexpr auto power = [](V x) {
    if constexpr (kDetail == Detail::kShort) return short_exp2(x);
    return exp2(x);
  };
  const V zero(Real(0)), log2_e{Real(kLog2E)};
  const V s_shift(student.shift), s_factor(student.factor), t_shift(teacher.shift), t_factor(teacher.factor);
  V e_sum = zero, h_sum = zero, q_sum = zero, dot = zero, x_sum = zero, e_z = zero, q_y = zero;
#pragma GCC unroll 2
  for (int64_t i = 0; i < count; i += kStep<Real>) {
    const V x = load(student.logits + i) - s_shift, z = x * s_factor, e = power(z);
    e_sum = e_sum + e;
    if constexpr (!kTeacher) x_sum = x_sum + x;
    store(powers.e + i, e);
    student.ahead.fetch(i);
    if constexpr (kHard == Hard::kSquare) h_sum = fma(e, e, h_sum);
    if constexpr (kHard == Hard::kSeparate) {
      const V h = power(x * log2_e);
      h_sum = h_sum + h;
      store(powers.h + i, h);
    }
    if constexpr (kEntropies) e_z = e_z + select(e == zero, zero, e * z);
    if constexpr (kTeacher) {
      const V y = (load(teacher.logits + i) - t_shift) * t_factor, q = power(y);
      q_sum = q_sum + q;
      V w = q;
      if constexpr (kDivergence == Divergence::kCrossEntropy) dot = dot + select(q == zero, zero, q * z);
      if constexpr (kDivergence == Divergence::kForwardKl) dot = dot + select(q == zero, zero, q * (y - z));
      if constexpr (kDivergence == Divergence::kReverseKl) {
        w = select(e == zero, zero, e * (z - y));
        dot = dot + w;
      }
      if constexpr (kEntropies) q_y = q_y + select(q == zero, zero, q * y);
      store(powers.w + i, w);
      teacher.ahead.fetch(i);
    }
  }
  BlockSums sums;
  sums.e = reduce_sum(e_sum);
  sums.h = kHard == Hard::kSame ? sums.e : reduce_sum(h_sum);
  sums.q = reduce_sum(q_sum);
  sums.dot = reduce_sum(dot);
  sums.x = reduce_sum(x_sum);
  sums.e_z = reduce_sum(e_z);
  sums.q_y = reduce_sum(q_y);
  return sums;
}

template <class Real>
BlockSums exponentials(bool with_teacher, Divergence divergence, Hard hard, Detail detail,
                       const Exponents<Real>& student, const Exponents<Real>& teacher, int64_t count,
                       const Powers<Real>& powers) {
  auto run = [&](auto teaches, auto divergence_is, auto hard_is) {
    constexpr bool kTeacher = decltype(teaches)::value;
    constexpr Divergence kDivergence = decltype(divergence_is)::value;
    constexpr Hard kHard = decltype(hard_is)::value;
    auto with = [&](auto detail_is) {
      auto of = [&](int64_t i, int64_t steps) {
        return exponentials_of<kTeacher, kDivergence, kHard, decltype(detail_is)::value>(
            student + i, kTeacher ? teacher + i : teacher, steps, powers + i);
      };
      BlockSums sums = of(0, std::min(kRun<Real>, count));
      if constexpr (kRun<Real> < kBlock) {
        for (int64_t i = kRun<Real>; i < count; i += kRun<Real>) sums += of(i, std::min(kRun<Real>, count - i));
      }
      return sums;
    };
    if (detail == Detail::kEntropies) return with(Constant<Detail::kEntropies>{});
    return detail == Detail::kShort ? with(Constant<Detail::kShort>{}) : with(Constant<Detail::kPlain>{});
  };
  auto against = [&](auto hard_is) {
    if (!with_teacher) return run(Constant<false>{}, Constant<Divergence::kJsd>{}, hard_is);
    switch (divergence) {
      case Divergence::kCrossEntropy:
        return run(Constant<true>{}, Constant<Divergence::kCrossEntropy>{}, hard_is);
      case Divergence::kForwardKl:
        return run(Constant<true>{}, Constant<Divergence::kForwardKl>{}, hard_is);
      case Divergence::kReverseKl:
        return run(Constant<true>{}, Constant<Divergence::kReverseKl>{}, hard_is);
      default:  // tvd has the same first sweep
        return run(Constant<true>{}, Constant<Divergence::kJsd>{}, hard_is);
    }
  };
  return with_hard(hard, against);
}

// The second sweep of jsd and tvd: w = q becomes p * r, r being the derivative of the divergence with respect to p.
// Adds up the divergence, and the sum of p * r.
template <Divergence kDivergence, class Real>
void mixture(const Powers<Real>& powers, int64_t count, Real p_factor, Real q_factor, Real beta, double& divergence,
             double& ratio) {
  using V = Wide<Real>;
  const V zero(Real(0)), half(Real(0.5));
  const V p_scale(p_factor), q_scale(q_factor), q_share(beta), p_share(1 - beta);
  const V least(Real(0x1p-126));
  for (int64_t begin = 0; begin < count; begin += kRun<Real>) {
    V sum = zero, weighted = zero;
    for (int64_t i = begin; i < std::min(begin + kRun<Real>, count); i += kStep<Real>) {
      const V p = load(powers.e + i) * p_scale, q = load(powers.w + i) * q_scale;
      V part, p_r;
      if constexpr (kDivergence == Divergence::kTvd) {
        part = select(p > q, p - q, q - p) * half;
        p_r = p * select(p > q, half, select(p < q, zero - half, p - q));
      } else {
        const V one_over_m = V(Real(1)) / fma(q_share, q, p_share * p);
        p_r = select(p == zero, zero, p_share * p * log(max(least, p * one_over_m)));
        part = p_r + select(q == zero, zero, q_share * q * log(max(least, q * one_over_m)));
      }
      sum = sum + part;
      weighted = weighted + p_r;
      store(powers.w + i, p_r);
    }
    divergence += reduce_sum(sum);
    ratio += reduce_sum(weighted);
  }
}

// An entry of the gradient is (e + e_e * e) * e + w * w' + h * h' + constant, primes being of Powers.
template <class Real>
struct GradientFactors {
  Real e, e_e, w, h, constant;
};

// The last sweep
template <bool kW, Hard kHard, class Real, class S>
void write_gradient_of(Powers<Real> powers, int64_t count, const GradientFactors<Real>& factors, S* gradient) {
  using V = Wide<Real>;
  const V e_factor(factors.e), e_e_factor(factors.e_e), w_factor(factors.w), h_factor(factors.h);
  const V constant(factors.constant);
  auto entries = [&](int64_t i) {
    const V e = load(powers.e + i);
    V g = kHard == Hard::kSquare ? fma(fma(e_e_factor, e, e_factor), e, constant) : fma(e_factor, e, constant);
    if constexpr (kW) g = fma(w_factor, load(powers.w + i), g);
    if constexpr (kHard == Hard::kSeparate) g = fma(h_factor, load(powers.h + i), g);
    return g;
  };
  int64_t i = 0;
  if constexpr (kStep<Real> > 1) {
    for (; i + 2 * kStep<Real> <= count; i += 2 * kStep<Real>) {
      simd::store_two(gradient + i, entries(i), entries(i + kStep<Real>));
    }
  }
  for (; i + kStep<Real> <= count; i += kStep<Real>) store(gradient + i, entries(i));
  if constexpr (kStep<Real> > 1) {
    if (i < count) simd::store_first(gradient + i, entries(i), count - i);
  }
}

template <class Real, class S>
void write_gradient(bool with_w, Hard hard, const Powers<Real>& powers, int64_t count,
                    const GradientFactors<Real>& factors, S* gradient) {
  with_hard(hard, [&](auto hard_is) {
    constexpr Hard kHard = decltype(hard_is)::value;
    if (with_w) {
      write_gradient_of<true, kHard>(powers, count, factors, gradient);
    } else {
      write_gradient_of<false, kHard>(powers, count, factors, gradient);
    }
  });
}

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
