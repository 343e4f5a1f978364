// One row at a time, three or four sweeps over it while it stays in the core's cache: the highest logits; the sums of
// exponentials and what the divergence adds up; for jsd and tvd, which need normalised probabilities, once more; the
// gradient.
//
// In a sweep x = s - max s and z = x / T belong to the student, y = (t - max t) / T_t to the teacher. Everything is
// formed from these differences: log-sum-exps of large logits would cancel.
#include <algorithm>
#include <vector>

#include "kd_loss.h"
#include "reals.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {
namespace {

constexpr double kInfinity = INFINITY;
constexpr int64_t kBlock = 2048;  // sums are of floats within a block, of doubles across blocks

// The wide type of a sweep, and that of one element
template <class Real>
using Wide = std::conditional_t<std::is_same_v<Real, float>, Vec, double>;

template <class T>
const T* row_of(const Logits& logits, int64_t n) {
  return static_cast<const T*>(logits.data) + n / logits.inner * logits.outer_stride + n % logits.inner * logits.stride;
}

// Calls body(V{}, i) for all i in [begin, end), V being what is done at once from i on.
template <class Real, class Body>
inline void sweep(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + lanes<Wide<Real>> <= end; i += lanes<Wide<Real>>) body(Wide<Real>{}, i);
  for (; i < end; ++i) body(Real{}, i);
}

// What a sweep adds up: kCount sums, wide within a block and double beyond it.
template <class Real, int kCount>
struct Sums {
  double total[kCount] = {};
  Wide<Real> wide[kCount];
  Real narrow[kCount];

  Sums() { clear(); }
  void clear() {
    for (int i = 0; i < kCount; ++i) wide[i] = Wide<Real>(Real(0)), narrow[i] = 0;
  }
  template <class V>
  void add(int i, V value) {
    if constexpr (std::is_same_v<V, Wide<Real>>) {
      wide[i] = wide[i] + value;
    } else {
      narrow[i] += value;
    }
  }
  void flush() {
    for (int i = 0; i < kCount; ++i)
      total[i] += static_cast<double>(reduce_sum(wide[i])) + static_cast<double>(narrow[i]);
    clear();
  }
};

// -inf only where all are, NaN where there is no other number than NaN
template <class Real, class T>
Real highest(const T* x, int64_t count) {
  Wide<Real> wide(-INFINITY);
  Real narrow = -INFINITY;
  sweep<Real>(0, count, [&](auto v, int64_t i) {
    using V = decltype(v);
    if constexpr (std::is_same_v<V, Wide<Real>>) {
      wide = max(load<V>(x + i), wide);
    } else {
      narrow = max(load<V>(x + i), narrow);
    }
  });
  const Real found = max(Real(reduce_max(wide)), narrow);
  if (found == -INFINITY) {
    for (int64_t i = 0; i < count; ++i) {
      if (load<Real>(x + i) != found) return NAN;
    }
  }
  return found;
}

// The teacher of a row: exponents y = (logits - shift) * inverse_temperature of probabilities exp(y + log_scale), 0
// from width on.
template <class T>
struct Teacher {
  const T* logits = nullptr;
  int64_t width = 0;
  double shift = 0, inverse_temperature = 1;
  double log_scale = 0;
  double mass = 0;  // sum of the probabilities
};

template <class Real, class S>
class Row {
 public:
  Row(const Arguments& arguments, int64_t n)
      : options(arguments.options),
        width(arguments.student.width),
        logits(row_of<S>(arguments.student, n)),
        label(arguments.labels && options.hard > 0 ? arguments.labels[n] : -1),
        coefficient(static_cast<const Real*>(arguments.coefficient)[n]),
        gradient(arguments.gradient ? static_cast<S*>(arguments.gradient) + n * width : nullptr) {
    shift = highest<Real>(logits, width);
  }

  bool dead() const { return shift == -INFINITY; }

  // The loss against a teacher of logits T, normalised here unless it is given by log-probabilities.
  template <Divergence kDivergence, class T>
  double loss(Teacher<T> teacher, bool normalise) {
    if (normalise) {
      teacher.shift = highest<Real>(teacher.logits, teacher.width);
      if (teacher.shift == -INFINITY) teacher.shift = 0;  // no probability at all
    }
    double divergence = sums<kDivergence>(teacher, normalise);
    double ratio = 0;  // sum of p * r, r the derivative of the divergence with respect to p
    if constexpr (kDivergence == Divergence::kReverseKl) ratio = divergence;
    if constexpr (kDivergence == Divergence::kJsd || kDivergence == Divergence::kTvd) {
      divergence = dead() ? divergence_of_nothing(kDivergence, teacher.mass) : mixture<kDivergence>(teacher, ratio);
    }
    write_gradient<kDivergence>(teacher, ratio);
    return total(divergence);
  }

  // The loss against k listed probabilities and a floor, for cross_entropy and forward_kl: the floor's part follows
  // from sums. False: it does not, as the student has -inf where the floor is.
  bool listed_loss(const int64_t* ids, const Real* listed, int64_t k, Real floor, double& result) {
    Teacher<float> nothing;
    sums<Divergence::kCrossEntropy>(nothing, false);
    if (floor > 0 && !(sum_of_x > -kInfinity)) return false;
    const bool kl = options.divergence == Divergence::kForwardKl;
    double divergence = 0, mass = 0;
    if (floor > 0) {
      divergence = -floor * (sum_of_x / options.temperature - static_cast<double>(width) * log_sum);
      mass = floor * static_cast<double>(width - k);
      if (kl) divergence += mass * std::log(static_cast<double>(floor));
    }
    for (int64_t j = 0; j < k; ++j) {
      const double q = listed[j], over = q - floor;
      mass += q;
      if (over != 0) divergence -= over * ((load<Real>(logits + ids[j]) - shift) / options.temperature - log_sum);
      if (kl && q > 0) divergence += q * std::log(q);
    }
    nothing.mass = mass;
    write_gradient<Divergence::kCrossEntropy>(nothing, 0, floor);
    if (gradient && !dead()) {
      for (int64_t j = 0; j < k; ++j) {
        write_entry(ids[j], soft_scale() * (probability(ids[j]) * mass - static_cast<double>(listed[j])));
      }
    }
    result = total(dead() && mass > 0 ? kInfinity : divergence);
    return true;
  }

 private:
  double soft_scale() const { return options.soft / options.temperature; }
  double probability(int64_t i) const {
    return std::exp((load<Real>(logits + i) - shift) / options.temperature - log_sum);
  }

  // jsd or tvd where the student has no probability at all
  double divergence_of_nothing(Divergence divergence, double mass) const {
    return divergence == Divergence::kTvd ? 0.5 * mass : -options.jsd_beta * std::log(options.jsd_beta) * mass;
  }

  // Sets the normalisers of both sides -> the divergence, where these sums give it.
  template <Divergence kDivergence, class T>
  double sums(Teacher<T>& teacher, bool normalise) {
    constexpr bool kForward = kDivergence == Divergence::kCrossEntropy || kDivergence == Divergence::kForwardKl;
    enum { kHard, kX, kStudent, kTeacher, kDot, kCount };
    const bool hard = options.hard > 0, soft = options.soft > 0;
    const bool same = options.temperature == 1, square = options.temperature == 2;
    const bool smoothed = options.label_smoothing > 0 || (soft && !teacher.logits);
    const Real inverse = 1 / options.temperature, inverse_teacher = teacher.inverse_temperature;
    const Real student_shift = dead() ? 0 : shift, teacher_shift = teacher.shift;
    Sums<Real, kCount> sum;
    auto student = [&](auto v, int64_t i) {
      using V = decltype(v);
      const V x = load<V>(logits + i) - V(student_shift), z = x * V(inverse);
      const V e = exp(z);
      sum.add(kStudent, e);
      if (hard && !same) sum.add(kHard, square ? e * e : exp(x));
      if (smoothed) sum.add(kX, x);
      return std::pair(z, e);
    };
    auto both = [&](auto v, int64_t i) {
      using V = decltype(v);
      const V zero(0);
      const auto [z, e] = student(v, i);
      const V y = (load<V>(teacher.logits + i) - V(teacher_shift)) * V(inverse_teacher);
      const V q = exp(y);
      sum.add(kTeacher, q);
      if constexpr (kDivergence == Divergence::kCrossEntropy) sum.add(kDot, select(q == zero, zero, q * z));
      if constexpr (kDivergence == Divergence::kForwardKl) sum.add(kDot, select(q == zero, zero, q * (y - z)));
      if constexpr (kDivergence == Divergence::kReverseKl) sum.add(kDot, select(e == zero, zero, e * (z - y)));
    };
    for (int64_t i = 0; i < teacher.width; i += kBlock) {
      sweep<Real>(i, std::min(i + kBlock, teacher.width), both);
      sum.flush();
    }
    double beyond = 0;  // student's mass where the teacher has none
    for (int64_t i = teacher.width; i < width; i += kBlock) {
      const double before = sum.total[kStudent];
      sweep<Real>(i, std::min(i + kBlock, width), [&](auto v, int64_t j) { student(v, j); });
      sum.flush();
      beyond += sum.total[kStudent] - before;
    }
    log_sum = std::log(sum.total[kStudent]);
    log_sum_hard = same ? log_sum : std::log(sum.total[kHard]);
    sum_of_x = sum.total[kX];
    const double q_sum = sum.total[kTeacher];
    if (normalise) teacher.log_scale = q_sum == 0 ? 0 : -std::log(q_sum);
    teacher.mass = normalise ? (q_sum == 0 ? 0 : q_sum / q_sum) : q_sum;
    const double scale = std::exp(teacher.log_scale);
    if (dead()) return kForward && teacher.mass > 0 ? kInfinity : 0;
    if constexpr (kDivergence == Divergence::kCrossEntropy) return teacher.mass * log_sum - scale * sum.total[kDot];
    if constexpr (kDivergence == Divergence::kForwardKl) {
      return scale * sum.total[kDot] + teacher.mass * (teacher.log_scale + log_sum);
    }
    if constexpr (kDivergence == Divergence::kReverseKl) {
      if (beyond > 0) return kInfinity;
      return sum.total[kDot] / sum.total[kStudent] - log_sum - teacher.log_scale;
    }
    return 0;
  }

  // jsd and tvd from normalised probabilities; ratio as in loss().
  template <Divergence kDivergence, class T>
  double mixture(const Teacher<T>& teacher, double& ratio) {
    const Real beta = options.jsd_beta;
    Sums<Real, 2> sum;
    for (int64_t begin = 0; begin < width; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, width);
      over_teacher<kDivergence>(teacher, begin, end, [&](auto v, int64_t, auto p, auto q, auto log_q, auto r) {
        using V = decltype(v);
        const V zero(0);
        sum.add(1, p * r);
        if constexpr (kDivergence == Divergence::kTvd) {
          sum.add(0, select(p > q, p - q, q - p) * V(Real(0.5)));
        } else {  // r is (1 - beta) * log(p / m)
          const V m = V(beta) * q + V(1 - beta) * p;
          sum.add(0, p * r + select(q == zero, zero, V(beta) * q * (log_q - log(m))));
        }
      });
      sum.flush();
    }
    ratio = sum.total[1];
    return sum.total[0];
  }

  // Calls body(V{}, i, p, q, log q, r) over [begin, end), r being the derivative of the divergence with respect to p.
  template <Divergence kDivergence, class T, class Body>
  void over_teacher(const Teacher<T>& teacher, int64_t begin, int64_t end, const Body& body) {
    const Real inverse = 1 / options.temperature, inverse_teacher = teacher.inverse_temperature;
    const Real student_shift = shift, student_log = log_sum, teacher_shift = teacher.shift,
               teacher_log = teacher.log_scale;
    const Real beta = options.jsd_beta;
    auto step = [&](auto v, int64_t i, auto log_q) {
      using V = decltype(v);
      const V zero(0);
      const V log_p = (load<V>(logits + i) - V(student_shift)) * V(inverse) - V(student_log);
      const V p = exp(log_p), q = exp(log_q);
      V r = zero;
      if constexpr (kDivergence == Divergence::kReverseKl) r = select(p == zero, zero, log_p - log_q);
      if constexpr (kDivergence == Divergence::kJsd) {
        const V m = V(beta) * q + V(1 - beta) * p;
        r = select(p == zero, zero, V(1 - beta) * (log_p - log(m)));
      }
      if constexpr (kDivergence == Divergence::kTvd) {
        r = select(p > q, V(Real(0.5)), select(p < q, V(Real(-0.5)), p - q));
      }
      body(v, i, p, q, log_q, r);
    };
    const int64_t middle = std::clamp(teacher.width, begin, end);
    sweep<Real>(begin, middle, [&](auto v, int64_t i) {
      using V = decltype(v);
      step(v, i, (load<V>(teacher.logits + i) - V(teacher_shift)) * V(inverse_teacher) + V(teacher_log));
    });
    sweep<Real>(middle, end, [&](auto v, int64_t i) { step(v, i, decltype(v)(Real(-INFINITY))); });
  }

  template <Divergence kDivergence, class T>
  void write_gradient(const Teacher<T>& teacher, double ratio, Real floor = 0) {
    if (!gradient) return;
    if (dead()) {
      std::fill(gradient, gradient + width, S{});
      return;
    }
    const bool hard = options.hard > 0, soft = options.soft > 0;
    const Real scale = coefficient * soft_scale(), hard_scale = coefficient * hard_factor();
    const Real even = coefficient * options.hard * options.label_smoothing / static_cast<double>(width);
    const Real hard_log = log_sum_hard, student_shift = shift;
    auto hard_part = [&](auto v, int64_t i) {
      using V = decltype(v);
      return V(hard_scale) * exp(load<V>(logits + i) - V(student_shift) - V(hard_log)) - V(even);
    };
    if (!soft) {
      sweep<Real>(0, width, [&](auto v, int64_t i) { store(gradient + i, hard_part(v, i)); });
    } else if constexpr (kDivergence == Divergence::kCrossEntropy || kDivergence == Divergence::kForwardKl) {
      write_forward(teacher, floor, scale, hard_scale, even);
    } else {
      over_teacher<kDivergence>(teacher, 0, width, [&](auto v, int64_t i, auto p, auto, auto, auto r) {
        using V = decltype(v);
        V g = V(scale) * p * (r - V(Real(ratio)));
        if (hard) g = g + hard_part(v, i);
        store(gradient + i, g);
      });
    }
    if (label >= 0) write_label<kDivergence>(teacher, ratio, floor);
  }

  // p * mass - q, and the hard part from the same exponential where the temperature is 1 or 2
  template <class T>
  void write_forward(const Teacher<T>& teacher, Real floor, Real scale, Real hard_scale, Real even) {
    const Real inverse = 1 / options.temperature, inverse_teacher = teacher.inverse_temperature;
    const Real student_shift = shift, teacher_shift = teacher.shift;
    const Real student_log = log_sum, hard_log = log_sum_hard, teacher_log = teacher.log_scale;
    const bool hard = options.hard > 0, same = options.temperature == 1, square = options.temperature == 2;
    const Real p_scale = scale * teacher.mass, floor_scale = scale * floor;
    const Real square_scale =
        hard_scale * std::exp(2 * log_sum - log_sum_hard);  // softmax(s) = square_scale * p ** 2 at T = 2
    auto student = [&](auto v, int64_t i) {
      using V = decltype(v);
      const V x = load<V>(logits + i) - V(student_shift);
      const V p = exp(x * V(inverse) - V(student_log));
      if (!hard) return V(p_scale) * p;
      if (same) return V(p_scale + hard_scale) * p - V(even);
      if (square) return (V(square_scale) * p + V(p_scale)) * p - V(even);
      return V(p_scale) * p + V(hard_scale) * exp(x - V(hard_log)) - V(even);
    };
    sweep<Real>(0, teacher.width, [&](auto v, int64_t i) {
      using V = decltype(v);
      const V y = (load<V>(teacher.logits + i) - V(teacher_shift)) * V(inverse_teacher);
      store(gradient + i, student(v, i) - V(scale) * exp(y + V(teacher_log)));
    });
    sweep<Real>(teacher.width, width,
                [&](auto v, int64_t i) { store(gradient + i, student(v, i) - decltype(v)(floor_scale)); });
  }

  // The label's entry once more, from doubles: rounded to the gradient's type only when it is complete.
  template <Divergence kDivergence, class T>
  void write_label(const Teacher<T>& teacher, double ratio, Real floor) {
    double soft = 0;
    if (options.soft > 0) {
      if constexpr (kDivergence == Divergence::kCrossEntropy || kDivergence == Divergence::kForwardKl) {
        double q = floor;
        if (label < teacher.width) {
          q = std::exp((load<Real>(teacher.logits + label) - teacher.shift) * teacher.inverse_temperature +
                       teacher.log_scale);
        }
        soft = soft_scale() * (probability(label) * teacher.mass - q);
      } else {
        const int64_t i = label;
        sweep_one<kDivergence>(teacher, i, [&](auto p, auto r) { soft = soft_scale() * p * (r - ratio); });
      }
    }
    write_entry(label, soft);
  }
  template <Divergence kDivergence, class T, class Body>
  void sweep_one(const Teacher<T>& teacher, int64_t i, const Body& body) {
    over_teacher<kDivergence>(teacher, i, i + 1, [&](auto v, int64_t, auto p, auto, auto, auto r) {
      if constexpr (std::is_same_v<decltype(v), Real>) body(static_cast<double>(p), static_cast<double>(r));
    });
  }

  // Entry i of the gradient: its part from the divergence, and the hard part.
  void write_entry(int64_t i, double soft) {
    double g = soft;
    if (options.hard > 0) {
      const double x = load<Real>(logits + i) - shift;
      g += hard_factor() * std::exp(x - log_sum_hard) -
           options.hard * options.label_smoothing / static_cast<double>(width);
      if (i == label) g -= options.hard * (1 - options.label_smoothing);
    }
    store(gradient + i, static_cast<Real>(coefficient * g));
  }

  double log_sum_exp() const { return shift + log_sum_hard; }
  double hard_factor() const { return options.hard * (1 + 2 * options.z_loss * log_sum_exp()); }

  double total(double divergence) const {
    double loss = options.soft > 0 ? options.soft * divergence : 0;
    if (options.hard > 0) {
      const double gold = dead() ? kInfinity : log_sum_hard - (load<Real>(logits + label) - shift);
      double nll = options.label_smoothing < 1 ? (1 - options.label_smoothing) * gold : 0;
      if (options.label_smoothing > 0) {
        nll += options.label_smoothing * (dead() ? kInfinity : log_sum_hard - sum_of_x / static_cast<double>(width));
      }
      if (options.z_loss > 0) nll += options.z_loss * (dead() ? kInfinity : log_sum_exp() * log_sum_exp());
      loss += options.hard * nll;
    }
    return coefficient * loss;
  }

  const Options& options;
  const int64_t width;
  const S* logits;
  const int64_t label;       // -1 without a hard part
  const double coefficient;  // of the whole row
  S* gradient;               // or null
  Real shift;                // highest logit
  double log_sum = 0;        // log of the sum of exp(z)
  double log_sum_hard = 0;   // of exp(x)
  double sum_of_x = 0;       // where smoothing or a floor needs it
};

template <class Real, class S, class T>
double dense_loss(Row<Real, S>& row, const Teacher<T>& teacher, bool normalise, Divergence divergence) {
  switch (divergence) {
    case Divergence::kCrossEntropy:
      return row.template loss<Divergence::kCrossEntropy>(teacher, normalise);
    case Divergence::kForwardKl:
      return row.template loss<Divergence::kForwardKl>(teacher, normalise);
    case Divergence::kReverseKl:
      return row.template loss<Divergence::kReverseKl>(teacher, normalise);
    case Divergence::kJsd:
      return row.template loss<Divergence::kJsd>(teacher, normalise);
    default:
      return row.template loss<Divergence::kTvd>(teacher, normalise);
  }
}

template <class Real, class T>
void widen(const T* from, int64_t count, Real* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load<Real>(from + i);
}

// `scratch` holds a row of the teacher that is not of the student's type or not of logits.
template <class Real, class S>
double loss_of_row(const Arguments& arguments, int64_t n, std::vector<Real>& scratch) {
  const Options& options = arguments.options;
  const int64_t width = arguments.student.width;
  Row<Real, S> row(arguments, n);
  if (options.soft == 0) return dense_loss(row, Teacher<S>{}, false, Divergence::kCrossEntropy);

  if (arguments.ids) {
    const int64_t* ids = arguments.ids + n * arguments.k;
    const Real* listed = static_cast<const Real*>(arguments.listed) + n * arguments.listed_stride;
    const Real floor = static_cast<const Real*>(arguments.floor)[n];
    double loss;
    const bool forward =
        options.divergence == Divergence::kCrossEntropy || options.divergence == Divergence::kForwardKl;
    if (forward && row.listed_loss(ids, listed, arguments.k, floor, loss)) return loss;
    scratch.assign(width, std::log(floor));
    for (int64_t j = 0; j < arguments.k; ++j) scratch[ids[j]] = std::log(listed[j]);
    Teacher<Real> teacher;
    teacher.logits = scratch.data();
    teacher.width = width;
    return dense_loss(row, teacher, false, options.divergence);
  }

  const int64_t shared = std::min(width, arguments.teacher.width);
  auto against = [&](auto* logits) {
    Teacher<std::remove_const_t<std::remove_pointer_t<decltype(logits)>>> teacher;
    teacher.logits = logits;
    teacher.width = shared;
    teacher.inverse_temperature = 1 / options.teacher_temperature;
    return dense_loss(row, teacher, true, options.divergence);
  };
  if (arguments.teacher.dtype == arguments.student.dtype) return against(row_of<S>(arguments.teacher, n));
  if constexpr (std::is_same_v<Real, float>) {
    if (arguments.teacher.dtype == Dtype::kFloat) return against(row_of<float>(arguments.teacher, n));
    scratch.resize(shared);
    if (arguments.teacher.dtype == Dtype::kBFloat16) {
      widen(row_of<simd::BFloat16>(arguments.teacher, n), shared, scratch.data());
    } else {
      widen(row_of<simd::Half>(arguments.teacher, n), shared, scratch.data());
    }
  }
  return against(static_cast<const Real*>(scratch.data()));
}

template <class Real, class S>
void loss_of_rows_of(const Arguments& arguments, int64_t begin, int64_t end) {
  const int64_t width = arguments.student.width;
  std::vector<Real> scratch;
  for (int64_t n = begin; n < end; ++n) {
    double loss = 0;
    if (static_cast<const Real*>(arguments.coefficient)[n] != 0) {
      loss = loss_of_row<Real, S>(arguments, n, scratch);
    } else if (arguments.gradient) {
      S* gradient = static_cast<S*>(arguments.gradient) + n * width;
      std::fill(gradient, gradient + width, S{});
    }
    static_cast<Real*>(arguments.losses)[n] = static_cast<Real>(loss);
  }
}

}  // namespace

void loss_of_rows(const Arguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.student.dtype) {
    case Dtype::kFloat:
      return loss_of_rows_of<float, float>(arguments, begin, end);
    case Dtype::kBFloat16:
      return loss_of_rows_of<float, simd::BFloat16>(arguments, begin, end);
    case Dtype::kHalf:
      return loss_of_rows_of<float, simd::Half>(arguments, begin, end);
    case Dtype::kDouble:
      return loss_of_rows_of<double, double>(arguments, begin, end);
  }
}

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
