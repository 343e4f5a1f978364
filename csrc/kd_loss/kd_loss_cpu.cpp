// A row is read from memory once: a first sweep keeps the exponentials of all tokens in the core's cache and adds them
// up (row.h), jsd and tvd, which need normalised probabilities, take a second, and the last turns the exponentials into
// the gradient (gradient.h). The loops themselves are in sweeps.h. The last sweep over a row takes turns with the first
// over the next, block by block, so that memory is read and written while exponentials are computed.
#include "kd_loss.h"

#include <cstring>
#include <optional>

#include "gradient.h"
#include "reals.h"
#include "row.h"

namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA {
namespace {

bool is_forward(Divergence divergence) {
  return divergence == Divergence::kCrossEntropy || divergence == Divergence::kForwardKl;
}

// Listed probabilities and that of every other token, by row
template <class Real>
struct Listed {
  const int64_t* ids;
  const Real* probabilities;
  int64_t k;
  Real floor;
};

// Sum of q ln q
template <class Real>
double sum_of_q_log_q(const Real* q, int64_t count) {
  using V = Wide<Real>;
  const V zero(Real(0));
  V sum = zero;
  int64_t i = 0;
  for (; i + kStep<Real> <= count; i += kStep<Real>) {
    const V value = load(q + i);
    sum = sum + select(value == zero, zero, value * log(value));
  }
  double total = reduce_sum(sum);
  for (; i < count; ++i) total += q[i] == 0 ? 0 : q[i] * std::log(static_cast<double>(q[i]));
  return total;
}

void clear(const RowOfLogits& row) { std::memset(const_cast<void*>(row.data), 0, row.width * size_of(row.dtype)); }

template <class Real>
class Row {
 public:
  // `pending` is the gradient of the row before, and becomes that of this row.
  Row(const Arguments& arguments, int64_t n, Scratch<Real>& scratch, std::optional<Gradient<Real>>& pending)
      : arguments_(arguments),
        options_(arguments.options),
        n_(n),
        width_(arguments.student.width),
        coefficient_(static_cast<const Real*>(arguments.coefficient)[n]),
        label_(arguments.labels && (options_.hard > 0 || arguments.parts) ? arguments.labels[n] : -1),
        sweep_{RowOfLogits(arguments.student, n),
               RowOfLogits(arguments.student, next_row()),
               nullptr,
               hard_mode(label_ >= 0, options_.temperature),
               static_cast<Real>(kLog2E / options_.temperature),
               0,
               scratch},
        pending_(pending) {}

  double loss() {
    if (options_.soft > 0 || arguments_.parts) {
      if (arguments_.ids) return loss_of_listed();
      if (arguments_.teacher.data) {
        const int64_t shared = std::min(width_, arguments_.teacher.width);
        Teacher teacher{RowOfLogits(arguments_.teacher, n_), RowOfLogits(arguments_.teacher, next_row()),
                        options_.teacher_temperature};
        teacher.logits.width = shared;
        return loss_against(teacher);
      }
    }
    run(Divergence::kJsd, wants_x());
    set_gradient(false, [](const Block&) { return GradientFactors<Real>{}; }, 0, 0);
    return total(0);
  }

 private:
  int64_t next_row() const { return std::min(n_ + 1, arguments_.rows - 1); }
  bool wants_x() const { return label_ >= 0 && options_.label_smoothing > 0; }
  static Hard hard_mode(bool needed, double temperature) {
    return !needed ? Hard::kNone : temperature == 1 ? Hard::kSame : temperature == 2 ? Hard::kSquare : Hard::kSeparate;
  }
  double soft_scale() const { return coefficient_ * options_.soft / options_.temperature; }
  double log_sum_exp() const { return sweep_.shift + kLn2 * sweep_.log_h; }
  double hard_scale() const {
    return options_.hard > 0 ? coefficient_ * options_.hard * (1 + 2 * options_.z_loss * log_sum_exp()) : 0;
  }
  double even() const { return coefficient_ * options_.hard * options_.label_smoothing / width_; }
  double x_of_label() const { return sweep_.student.template at<Real>(label_) - sweep_.shift; }

  void run(Divergence divergence, bool want_x) {
    sweep_.run(divergence, want_x, arguments_.parts, [&](int64_t begin) {
      if (pending_) pending_->write_block(sweep_.scratch, begin);
    });
    pending_.reset();
  }

  double loss_against(Teacher& teacher) {
    const Divergence divergence = options_.divergence;
    sweep_.teacher = &teacher;
    sweep_.teacher_factor = static_cast<Real>(kLog2E / teacher.temperature);
    run(divergence, wants_x());
    if (arguments_.parts) {
      record_teacher(log_sum_exp_of(teacher), kLn2 * (sweep_.mass * sweep_.log_q - sweep_.q_y),
                     teacher.logits.template find<Real>(sweep_.teacher_shift));
    }
    double result = 0, ratio = 0;  // ratio: sum of p * r, r being the derivative of the divergence with respect to p
    if (is_forward(divergence)) {
      const double cross = divergence == Divergence::kCrossEntropy;
      result =
          sweep_.dead()
              ? (sweep_.mass > 0 ? kInfinity : 0)
              : kLn2 * (sweep_.mass * (sweep_.log_e - (cross ? 0 : sweep_.log_q)) + (cross ? -sweep_.dot : sweep_.dot));
    } else if (divergence == Divergence::kReverseKl) {
      result = ratio = sweep_.dead() ? 0 : kLn2 * (sweep_.dot - sweep_.log_e + sweep_.log_q);
    } else if (sweep_.dead()) {
      const double beta = options_.jsd_beta;
      result = sweep_.mass * (divergence == Divergence::kTvd ? 0.5 : -beta * std::log(beta));
    } else {
      mix(result, ratio);
    }
    const double scale = soft_scale();
    auto factors = [&](const Block& block) {
      GradientFactors<Real> f{};
      if (is_forward(divergence)) {
        f.e = scale * sweep_.mass * block.p_factor;
        f.w = -scale * block.q_factor;
      } else if (divergence != Divergence::kReverseKl) {
        f.e = -scale * ratio * block.p_factor;
        f.w = scale;
      } else if (block.p_factor != 0) {
        const double apart = block.student_moved - block.teacher_moved - (sweep_.log_e - sweep_.log_q);
        f.e = scale * block.p_factor * (kLn2 * apart - ratio);
        f.w = scale * block.p_factor * kLn2;
      }
      return f;
    };
    set_gradient(true, factors, label_ >= 0 && options_.soft > 0 ? soft_entry(label_, ratio) : 0, 0);
    return total(result);
  }

  void mix(double& result, double& ratio) {
    for (size_t i = 0; i < sweep_.scratch.blocks.size(); ++i) {
      const Block& block = sweep_.scratch.blocks[i];
      const int64_t count = std::min<int64_t>(kBlock, width_ - i * kBlock);
      auto run = [&](auto divergence) {
        mixture<decltype(divergence)::value, Real>(sweep_.scratch.at(i * kBlock), count, block.p_factor, block.q_factor,
                                                   options_.jsd_beta, result, ratio);
      };
      options_.divergence == Divergence::kJsd ? run(Constant<Divergence::kJsd>{}) : run(Constant<Divergence::kTvd>{});
    }
  }

  // The divergence's part of an entry of the gradient, without coefficient
  double soft_entry(int64_t i, double ratio) const {
    const double log_p = kLn2 * sweep_.log_p(i), log_q = kLn2 * sweep_.log_teacher(i);
    const double p = std::exp(log_p), q = std::exp(log_q), beta = options_.jsd_beta;
    double r = 0;
    switch (options_.divergence) {
      case Divergence::kReverseKl:
        r = log_p - log_q;
        break;
      case Divergence::kJsd:
        r = (1 - beta) * (log_p - std::log(beta * q + (1 - beta) * p));
        break;
      case Divergence::kTvd:
        r = p > q ? 0.5 : p < q ? -0.5 : p - q;
        break;
      default:
        return options_.soft / options_.temperature * (p * sweep_.mass - q);
    }
    return p == 0 ? 0 : options_.soft / options_.temperature * p * (r - ratio);
  }

  // Against a few listed tokens the first sweep reads the student alone, and what the divergence has from all others
  // follows from its sums. Not so for divergences that are not linear in log p, or with -inf where the floor is.
  double loss_of_listed() {
    const Real* rows = static_cast<const Real*>(arguments_.listed);
    const Listed<Real> q{arguments_.ids + n_ * arguments_.k, rows + n_ * arguments_.listed_stride, arguments_.k,
                         static_cast<const Real*>(arguments_.floor)[n_]};
    if (is_forward(options_.divergence)) {
      run(Divergence::kJsd, wants_x() || q.floor > 0);
      if (q.floor == 0 || sweep_.x > -kInfinity) return loss_of_listed(q);
    }
    std::vector<Real>& row = sweep_.scratch.listed_row;
    row.assign(width_, std::log(q.floor));
    for (int64_t j = 0; j < q.k; ++j) row[q.ids[j]] = std::log(q.probabilities[j]);
    constexpr Dtype kReal = std::is_same_v<Real, float> ? Dtype::kFloat : Dtype::kDouble;
    const RowOfLogits logits(row.data(), kReal, width_);
    Teacher teacher{logits, logits, 1, false};
    return loss_against(teacher);
  }

  double loss_of_listed(const Listed<Real>& q) {
    const double others = static_cast<double>(width_ - q.k), floor = q.floor;
    const bool kl = options_.divergence == Divergence::kForwardKl;
    double mass = floor * others, log_p = 0;  // sum of (q - floor) * log2 p
    if (floor > 0) log_p = floor * (sweep_.x * sweep_.factor - static_cast<double>(width_) * sweep_.log_e);
    double q_at_label = floor;
    sweep_.student.template with<Real>([&](auto* logits) {
      for (int64_t j = 0; j < q.k; ++j) {
        const double over = q.probabilities[j] - floor;
        mass += q.probabilities[j];
        if (over != 0) {
          log_p += over * ((to_real<Real>(logits[q.ids[j]]) - sweep_.shift) * sweep_.factor - sweep_.log_e);
        }
        if (q.ids[j] == label_) q_at_label = q.probabilities[j];
      }
    });
    double q_log_q = 0;
    if (kl || arguments_.parts) {
      q_log_q = sum_of_q_log_q(q.probabilities, q.k) + (floor > 0 ? others * floor * std::log(floor) : 0);
    }
    if (arguments_.parts) record_teacher(mass == 0 ? -kInfinity : std::log(mass), -q_log_q, most_probable(q));
    sweep_.mass = mass;
    const double scale = soft_scale();
    auto factors = [&](const Block& block) {
      GradientFactors<Real> f{};
      f.e = scale * mass * block.p_factor;
      return f;
    };
    const double at_label =
        label_ < 0 ? 0 : options_.soft / options_.temperature * (std::exp2(sweep_.log_p(label_)) * mass - q_at_label);
    set_gradient(false, factors, at_label, -scale * floor);
    if (pending_) {
      pending_->list(q.ids, q.probabilities, q.k);
      pending_->per_probability = -scale;
    }
    return total(sweep_.dead() && mass > 0 ? kInfinity : -kLn2 * log_p + (kl ? q_log_q : 0));
  }

  // `factors` are of the divergence's part of the entries, `soft_at_label` that of the label without coefficient.
  template <class Factors>
  void set_gradient(bool with_w, const Factors& factors, double soft_at_label, double soft_constant) {
    if (!arguments_.gradient.data) return;
    const RowOfLogits row(arguments_.gradient, n_);
    if (sweep_.dead()) return clear(row);
    Gradient<Real>& gradient = pending_.emplace();
    gradient.row = row;
    gradient.stream = arguments_.stream;
    gradient.with_w = with_w && options_.soft > 0;
    gradient.hard = options_.hard > 0 ? sweep_.hard : Hard::kNone;
    const double hard_factor = hard_scale();
    gradient.constant = -even();
    for (const Block& block : sweep_.scratch.blocks) {
      GradientFactors<Real> f{};
      if (options_.soft > 0) f = factors(block);  // else an infinite divergence of the parts would make it NaN
      f.constant = -even() + soft_constant;
      const Real h = hard_factor * block.h_factor;
      if (gradient.hard == Hard::kSame) f.e += h;
      if (gradient.hard == Hard::kSquare) f.e_e = h;
      if (gradient.hard == Hard::kSeparate) f.h = h;
      gradient.factors.push_back(f);
    }
    if (label_ < 0) return;
    gradient.label = label_;
    gradient.at_label = coefficient_ * soft_at_label;
    if (options_.hard > 0) {
      gradient.at_label += hard_factor * std::exp2(x_of_label() * static_cast<Real>(kLog2E) - sweep_.log_h) - even() -
                           coefficient_ * options_.hard * (1 - options_.label_smoothing);
    }
  }

  double total(double divergence) {
    double nll = 0;
    if (label_ >= 0) {
      const bool dead = sweep_.dead();
      const double smoothing = options_.label_smoothing, log_h = kLn2 * sweep_.log_h;
      const double gold = dead ? kInfinity : log_h - kLn2 * x_of_label() * static_cast<Real>(kLog2E);
      if (smoothing < 1) nll = (1 - smoothing) * gold;
      if (smoothing > 0) nll += smoothing * (dead ? kInfinity : log_h - sweep_.x / width_);
      if (options_.z_loss > 0) nll += options_.z_loss * (dead ? kInfinity : log_sum_exp() * log_sum_exp());
    }
    if (arguments_.parts) record_student(nll, divergence);
    return coefficient_ *
           ((options_.hard > 0 ? options_.hard * nll : 0) + (options_.soft > 0 ? options_.soft * divergence : 0));
  }

  // --- Parts

  Real* parts() const { return static_cast<Real*>(arguments_.parts) + n_ * kParts; }

  double log_sum_exp_of(const Teacher& teacher) const {
    if (sweep_.mass == 0) return -kInfinity;
    if (!teacher.normalise) return std::log(sweep_.mass);
    return sweep_.teacher_shift / teacher.temperature + kLn2 * sweep_.log_q;
  }

  void record_teacher(double log_sum_exp, double entropy, int64_t most_probable) {
    parts()[kTeacherLogSumExp] = log_sum_exp;
    parts()[kTeacherEntropy] = log_sum_exp == -kInfinity ? 0 : entropy;
    parts()[kAgreement] = most_probable >= 0 && log_sum_exp != -kInfinity && most_probable == chosen();
  }

  void record_student(double nll, double divergence) {
    parts()[kNll] = nll;
    parts()[kDivergence] = divergence;
    parts()[kStudentLogSumExp] = sweep_.dead() ? -kInfinity : sweep_.shift / options_.temperature + kLn2 * sweep_.log_e;
    parts()[kStudentEntropy] = sweep_.dead() ? 0 : kLn2 * (sweep_.log_e - sweep_.p_z);
    parts()[kAccuracy] = label_ >= 0 && label_ == chosen();
  }

  // The token with the highest logit, -1 without
  int64_t chosen() const { return sweep_.dead() ? -1 : sweep_.student.find(static_cast<Real>(sweep_.shift)); }

  int64_t most_probable(const Listed<Real>& q) const {
    Real highest = q.floor;
    int64_t found = -1;
    for (int64_t j = 0; j < q.k; ++j) {
      if (q.probabilities[j] > highest || (q.probabilities[j] == highest && found >= 0 && q.ids[j] < found)) {
        highest = q.probabilities[j];
        found = q.ids[j];
      }
    }
    if (found >= 0 || q.k == width_) return found;
    // The floor is highest: the first token that is not below it
    std::vector<Real> row(width_, q.floor);
    for (int64_t j = 0; j < q.k; ++j) row[q.ids[j]] = q.probabilities[j];
    return std::find(row.begin(), row.end(), q.floor) - row.begin();
  }

  const Arguments& arguments_;
  const Options& options_;
  const int64_t n_, width_;
  const double coefficient_;  // of the whole row
  const int64_t label_;       // -1 where there is no need of it
  Sweep<Real> sweep_;
  std::optional<Gradient<Real>>& pending_;
};

template <class Real>
void loss_of_rows_of(const Arguments& arguments, int64_t begin, int64_t end) {
  Scratch<Real> scratch(arguments.student.width);
  std::optional<Gradient<Real>> pending;
  for (int64_t n = begin; n < end; ++n) {
    double loss = 0;
    if (arguments.parts) {
      Real* parts = static_cast<Real*>(arguments.parts) + n * kParts;
      std::fill(parts, parts + kParts, Real(0));
    }
    if (static_cast<const Real*>(arguments.coefficient)[n] != 0) {
      loss = Row<Real>(arguments, n, scratch, pending).loss();
    } else if (arguments.gradient.data) {
      clear(RowOfLogits(arguments.gradient, n));
    }
    static_cast<Real*>(arguments.losses)[n] = static_cast<Real>(loss);
  }
  for (int64_t i = 0; pending && i < arguments.student.width; i += kBlock) pending->write_block(scratch, i);
  if (arguments.stream) simd::finish_streams();
}

}  // namespace

void loss_of_rows(const Arguments& arguments, int64_t begin, int64_t end) {
  if (arguments.student.dtype == Dtype::kDouble) return loss_of_rows_of<double>(arguments, begin, end);
  loss_of_rows_of<float>(arguments, begin, end);
}

}  // namespace condgen_fast::kd_loss::CONDGEN_FAST_ISA
