// The CPU kernel against sums written out in double.
#include "kd_loss/kd_loss.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "testing.h"

namespace condgen_fast::kd_loss {
namespace {

constexpr Divergence kDivergences[] = {Divergence::kCrossEntropy, Divergence::kForwardKl, Divergence::kReverseKl,
                                       Divergence::kJsd, Divergence::kTvd};

std::vector<double> softmax(const std::vector<double>& logits, double temperature) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  for (double x : logits) p.push_back(std::exp((x - highest) / temperature));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= sum;
  return p;
}

double log_sum_exp(const std::vector<double>& logits) {
  double sum = 0;
  for (double x : logits) sum += std::exp(x);
  return std::log(sum);
}

// The loss of a row of logits against q; q may sum to less than one.
double plain_loss(const Options& options, const std::vector<double>& logits, const std::vector<double>& q,
                  int64_t label) {
  const std::vector<double> p = softmax(logits, options.temperature);
  const double beta = options.jsd_beta;
  double divergence = 0;
  for (size_t i = 0; i < q.size(); ++i) {
    const double m = beta * q[i] + (1 - beta) * p[i];
    switch (options.divergence) {
      case Divergence::kCrossEntropy:
        divergence -= q[i] * std::log(p[i]);
        break;
      case Divergence::kForwardKl:
        divergence += q[i] > 0 ? q[i] * std::log(q[i] / p[i]) : 0;
        break;
      case Divergence::kReverseKl:
        divergence += p[i] * std::log(p[i] / q[i]);
        break;
      case Divergence::kJsd:
        divergence += (q[i] > 0 ? beta * q[i] * std::log(q[i] / m) : 0) + (1 - beta) * p[i] * std::log(p[i] / m);
        break;
      case Divergence::kTvd:
        divergence += std::abs(p[i] - q[i]) / 2;
    }
  }
  const double lse = log_sum_exp(logits), mean = std::accumulate(logits.begin(), logits.end(), 0.0) / q.size();
  const double nll = (1 - options.label_smoothing) * (lse - logits[label]) + options.label_smoothing * (lse - mean) +
                     options.z_loss * lse * lse;
  return options.hard * nll + options.soft * divergence;
}

// By central differences
std::vector<double> plain_gradient(const Options& options, std::vector<double> logits, const std::vector<double>& q,
                                   int64_t label) {
  std::vector<double> gradient;
  for (double& x : logits) {
    const double at = x, step = 1e-5;
    x = at + step;
    const double above = plain_loss(options, logits, q, label);
    x = at - step;
    gradient.push_back((above - plain_loss(options, logits, q, label)) / (2 * step));
    x = at;
  }
  return gradient;
}

Arguments one_row(const Options& options, const float* student, int64_t width, const int64_t* label,
                  const float* coefficient, float* loss, float* gradient) {
  Arguments arguments{};
  arguments.options = options;
  arguments.rows = 1;
  arguments.student = {student, Dtype::kFloat, 1, width, width, width};
  arguments.labels = label;
  arguments.coefficient = coefficient;
  arguments.losses = loss;
  arguments.gradient = {gradient, Dtype::kFloat, 1, width, width, width};
  return arguments;
}

void check(const Arguments& arguments, const std::vector<double>& q) {
  const int64_t width = arguments.student.width;
  CONDGEN_FAST_CPU_CALL(loss_of_rows, arguments, 0, 1);
  const float* student = static_cast<const float*>(arguments.student.data);
  const std::vector<double> logits(student, student + width);
  const double factor = *static_cast<const float*>(arguments.coefficient);
  const double loss = factor * plain_loss(arguments.options, logits, q, *arguments.labels);
  CHECK_NEAR(*static_cast<const float*>(arguments.losses), loss, 1e-6 * (1 + std::abs(loss)));
  const std::vector<double> gradient = plain_gradient(arguments.options, logits, q, *arguments.labels);
  for (int64_t i = 0; i < width; ++i) {
    const bool kink =
        arguments.options.divergence == Divergence::kTvd &&
        std::abs(softmax(logits, arguments.options.temperature)[i] - q[i]) < 1e-4;  // differences are wrong there
    if (kink) return;
  }
  for (int64_t i = 0; i < width; ++i) {
    CHECK_NEAR(static_cast<const float*>(arguments.gradient.data)[i], factor * gradient[i], 2e-6);
  }
}

std::vector<float> random_logits(int64_t count) {
  std::vector<float> logits(count);
  for (float& x : logits) x = 2 * testing::random_normal();
  return logits;
}

Options random_options(Divergence divergence) {
  const double temperatures[] = {1, 2, 0.7, 3};
  const double temperature = temperatures[testing::random_int(0, 3)];
  return {divergence, 0.4, 0.6 * temperature, temperature, temperatures[testing::random_int(0, 3)], 0.3, 0.1, 0.01};
}

TEST(kd_loss_dense) {
  for (Divergence divergence : kDivergences) {
    for (int64_t width : {1, 2, 15, 16, 17, 33, 150}) {
      const Options options = random_options(divergence);
      const std::vector<float> student = random_logits(width), teacher = random_logits(width + 3);
      // The teacher is as wide, wider, or narrower (where that is finite).
      for (int64_t teacher_width : {width, width + 3, std::max<int64_t>(1, width - 2)}) {
        if (teacher_width < width && divergence == Divergence::kReverseKl) continue;
        const int64_t shared = std::min(width, teacher_width), label = testing::random_int(0, width - 1);
        std::vector<double> q = softmax({teacher.begin(), teacher.begin() + shared}, options.teacher_temperature);
        q.resize(width, 0.0);
        const float coefficient = 0.5f;
        float loss;
        std::vector<float> gradient(width);
        Arguments arguments = one_row(options, student.data(), width, &label, &coefficient, &loss, gradient.data());
        arguments.teacher = {teacher.data(), Dtype::kFloat, 1, teacher_width, teacher_width, teacher_width};
        check(arguments, q);
      }
    }
  }
}

TEST(kd_loss_listed) {
  for (Divergence divergence : kDivergences) {
    for (int64_t width : {4, 16, 40, 150}) {
      for (float floor : {0.0f, 0.001f}) {
        if (floor == 0 && divergence == Divergence::kReverseKl) continue;
        const Options options = random_options(divergence);
        const std::vector<float> student = random_logits(width);
        const std::vector<int64_t> ids = {width - 1, 0, 2};
        const std::vector<float> listed = {0.5f, 0.25f, 0.125f};
        std::vector<double> q(width, floor);
        for (int j = 0; j < 3; ++j) q[ids[j]] = listed[j];
        for (int64_t label : {int64_t{0}, int64_t{1}}) {  // listed and not
          const float coefficient = 2.0f;
          float loss;
          std::vector<float> gradient(width);
          Arguments arguments = one_row(options, student.data(), width, &label, &coefficient, &loss, gradient.data());
          arguments.ids = ids.data();
          arguments.listed = listed.data();
          arguments.listed_stride = 3;
          arguments.floor = &floor;
          arguments.k = 3;
          check(arguments, q);
        }
      }
    }
  }
}

TEST(kd_loss_row_that_counts_for_nothing) {
  const std::vector<float> student(20, NAN);
  const float coefficient = 0;
  const int64_t label = -100;
  float loss = NAN;
  std::vector<float> gradient(20, NAN);
  const Arguments arguments =
      one_row(random_options(Divergence::kForwardKl), student.data(), 20, &label, &coefficient, &loss, gradient.data());
  CONDGEN_FAST_CPU_CALL(loss_of_rows, arguments, 0, 1);
  CHECK(loss == 0);
  for (float g : gradient) CHECK(g == 0);
}

}  // namespace
}  // namespace condgen_fast::kd_loss
