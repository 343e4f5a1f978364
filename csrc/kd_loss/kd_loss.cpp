// Schemas of the kd_loss family, and its CPU ops.
#include "kd_loss.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"

namespace condgen_fast::kd_loss {
namespace {

constexpr int64_t kWorkPerLogit = 16;         // simple operations of a sweep over it
constexpr int64_t kStreamedBytes = 16 << 20;  // a gradient of so many would not be in the caches anyway

Dtype dtype_of(const Tensor& logits, const char* name) {
  check_dtype(logits, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      return Dtype::kDouble;
  }
}

Tensor with_contiguous_rows(const Tensor& logits) {
  return logits.size(2) <= 1 || logits.stride(2) == 1 ? logits : torch::stable::contiguous(logits);
}

Logits describe(const Tensor& logits, const char* name) {
  return {logits.data_ptr(), dtype_of(logits, name), logits.size(1),
          logits.stride(0),  logits.stride(1),       logits.size(2)};
}

void check_labels(const int64_t* labels, const void* coefficient, bool is_double, int64_t rows, int64_t vocab_size) {
  for (int64_t n = 0; n < rows; ++n) {
    const double factor =
        is_double ? static_cast<const double*>(coefficient)[n] : static_cast<const float*>(coefficient)[n];
    CONDGEN_FAST_CHECK(factor == 0 || (labels[n] >= 0 && labels[n] < vocab_size), "labels must be in [0, ", vocab_size,
                       ") or ignore_index; got ", labels[n]);
  }
}

void check_ids(const int64_t* ids, int64_t rows, int64_t k, int64_t vocab_size) {
  parallel_for(rows, 4 * k, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> last_row(vocab_size, -1);  // that a token was listed in
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t j = n * k; j < (n + 1) * k; ++j) {
        const int64_t id = ids[j];
        CONDGEN_FAST_CHECK(id >= 0 && id < vocab_size, "teacher.ids must be in [0, ", vocab_size, "); got ", id);
        CONDGEN_FAST_CHECK(last_row[id] != n, "teacher.ids must be distinct within a row; got ", id, " twice");
        last_row[id] = n;
      }
    }
  });
}

using Results = std::tuple<Tensor, Tensor, Tensor>;  // losses, gradient, parts

enum class Gradient { kNone, kNew, kOverLogits };

Gradient new_gradient(bool wanted) { return wanted ? Gradient::kNew : Gradient::kNone; }

Results run(Arguments& arguments, const Tensor& student, const std::optional<Tensor>& labels, const Tensor& coefficient,
            Gradient place, bool with_parts) {
  check_shape(student, "student", {-1, -1, -1});
  const int64_t rows = student.size(0) * student.size(1), width = student.size(2);
  CONDGEN_FAST_CHECK(width > 0, "student must have at least one column; got none");
  const Tensor logits = with_contiguous_rows(student);
  arguments.rows = rows;
  arguments.student = describe(logits, "student");
  const bool is_double = arguments.student.dtype == Dtype::kDouble;

  check_shape(coefficient, "coefficient", {rows});
  check_dtype(coefficient, "coefficient", {is_double ? ScalarType::Double : ScalarType::Float});
  const Tensor factors = torch::stable::contiguous(coefficient);
  arguments.coefficient = factors.data_ptr();
  CONDGEN_FAST_CHECK(labels.has_value() || arguments.options.hard == 0,
                     "labels must be given unless hard is 0; got None");
  Tensor kept_labels;
  if (labels) {
    check_shape(*labels, "labels", {rows});
    check_dtype(*labels, "labels", {ScalarType::Long});
    kept_labels = torch::stable::contiguous(*labels);
    arguments.labels = kept_labels.const_data_ptr<int64_t>();
    check_labels(arguments.labels, arguments.coefficient, is_double, rows, width);
  }

  Tensor losses = torch::stable::new_empty(factors, {rows});
  Tensor parts = torch::stable::new_empty(factors, {with_parts ? rows : 0, with_parts ? kParts : 0});
  Tensor gradient = place == Gradient::kNew
                        ? torch::stable::new_empty(student, {student.size(0), student.size(1), width})
                        : torch::stable::new_empty(student, {0});
  arguments.losses = losses.data_ptr();
  arguments.parts = with_parts ? parts.data_ptr() : nullptr;
  if (place == Gradient::kNew) arguments.gradient = describe(gradient, "gradient");
  if (place == Gradient::kOverLogits) {
    CONDGEN_FAST_CHECK(logits.data_ptr() == student.data_ptr(), "rows of student must be contiguous; got stride ",
                       student.stride(2));
    arguments.gradient = arguments.student;
  }
  arguments.stream = rows * width * size_of(arguments.student.dtype) >= kStreamedBytes;
  parallel_for(rows, kWorkPerLogit * width,
               [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(loss_of_rows, arguments, begin, end); });
  return {losses, gradient, parts};
}

Arguments with_options(int64_t divergence, double hard, double soft, double temperature, double teacher_temperature,
                       double jsd_beta, double label_smoothing, double z_loss) {
  CONDGEN_FAST_CHECK(divergence >= 0 && divergence <= 4, "divergence must be in [0, 4]; got ", divergence);
  CONDGEN_FAST_CHECK(temperature > 0, "temperature must be > 0; got ", temperature);
  CONDGEN_FAST_CHECK(teacher_temperature > 0, "teacher_temperature must be > 0; got ", teacher_temperature);
  Arguments arguments{};
  arguments.options = {static_cast<Divergence>(divergence),
                       hard,
                       soft,
                       temperature,
                       teacher_temperature,
                       jsd_beta,
                       label_smoothing,
                       z_loss};
  return arguments;
}

Results dense(Arguments arguments, const Tensor& student, const std::optional<Tensor>& teacher,
              const std::optional<Tensor>& labels, const Tensor& coefficient, Gradient place, bool with_parts) {
  CONDGEN_FAST_CHECK(teacher.has_value() || arguments.options.soft == 0,
                     "teacher must be given unless soft is 0; got None");
  Tensor kept;
  if (teacher) {
    check_shape(student, "student", {-1, -1, -1});
    check_shape(*teacher, "teacher", {student.size(0), student.size(1), -1});
    CONDGEN_FAST_CHECK((teacher->scalar_type() == ScalarType::Double) == (student.scalar_type() == ScalarType::Double),
                       "teacher must be float64 where student is, and only there");
    kept = with_contiguous_rows(*teacher);
    arguments.teacher = describe(kept, "teacher");
  }
  return run(arguments, student, labels, coefficient, place, with_parts);
}

Results sparse(Arguments arguments, const Tensor& student, const Tensor& ids, const Tensor& probabilities,
               const Tensor& floor, const std::optional<Tensor>& labels, const Tensor& coefficient, Gradient place,
               bool with_parts) {
  check_shape(student, "student", {-1, -1, -1});
  const int64_t rows = student.size(0) * student.size(1), k = ids.size(ids.dim() - 1);
  const ScalarType real = student.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_shape(ids, "ids", {rows, k});
  check_dtype(ids, "ids", {ScalarType::Long});
  check_shape(probabilities, "probabilities", {rows, k});
  check_dtype(probabilities, "probabilities", {real});
  check_shape(floor, "floor", {rows});
  check_dtype(floor, "floor", {real});
  const Tensor kept_ids = torch::stable::contiguous(ids), kept_floor = torch::stable::contiguous(floor);
  const bool one_for_all = rows > 0 && probabilities.stride(0) == 0 && (k <= 1 || probabilities.stride(1) == 1);
  const Tensor listed = one_for_all ? probabilities : torch::stable::contiguous(probabilities);
  arguments.ids = kept_ids.const_data_ptr<int64_t>();
  arguments.listed = listed.data_ptr();
  arguments.listed_stride = one_for_all ? 0 : k;
  arguments.floor = kept_floor.data_ptr();
  arguments.k = k;
  check_ids(arguments.ids, rows, k, student.size(2));
  return run(arguments, student, labels, coefficient, place, with_parts);
}

Results kd_loss_dense_cpu(const Tensor& student, const std::optional<Tensor>& teacher,
                          const std::optional<Tensor>& labels, const Tensor& coefficient, int64_t divergence,
                          double hard, double soft, double temperature, double teacher_temperature, double jsd_beta,
                          double label_smoothing, double z_loss, bool with_gradient, bool with_parts) {
  return dense(
      with_options(divergence, hard, soft, temperature, teacher_temperature, jsd_beta, label_smoothing, z_loss),
      student, teacher, labels, coefficient, new_gradient(with_gradient), with_parts);
}

Tensor kd_loss_dense_over_logits_cpu(const Tensor& student, const std::optional<Tensor>& teacher,
                                     const std::optional<Tensor>& labels, const Tensor& coefficient, int64_t divergence,
                                     double hard, double soft, double temperature, double teacher_temperature,
                                     double jsd_beta, double label_smoothing, double z_loss) {
  return std::get<0>(
      dense(with_options(divergence, hard, soft, temperature, teacher_temperature, jsd_beta, label_smoothing, z_loss),
            student, teacher, labels, coefficient, Gradient::kOverLogits, false));
}

Results kd_loss_sparse_cpu(const Tensor& student, const Tensor& ids, const Tensor& probabilities, const Tensor& floor,
                           const std::optional<Tensor>& labels, const Tensor& coefficient, int64_t divergence,
                           double hard, double soft, double temperature, double teacher_temperature, double jsd_beta,
                           double label_smoothing, double z_loss, bool with_gradient, bool with_parts) {
  return sparse(
      with_options(divergence, hard, soft, temperature, teacher_temperature, jsd_beta, label_smoothing, z_loss),
      student, ids, probabilities, floor, labels, coefficient, new_gradient(with_gradient), with_parts);
}

Tensor kd_loss_sparse_over_logits_cpu(const Tensor& student, const Tensor& ids, const Tensor& probabilities,
                                      const Tensor& floor, const std::optional<Tensor>& labels,
                                      const Tensor& coefficient, int64_t divergence, double hard, double soft,
                                      double temperature, double teacher_temperature, double jsd_beta,
                                      double label_smoothing, double z_loss) {
  return std::get<0>(
      sparse(with_options(divergence, hard, soft, temperature, teacher_temperature, jsd_beta, label_smoothing, z_loss),
             student, ids, probabilities, floor, labels, coefficient, Gradient::kOverLogits, false));
}

}  // namespace
}  // namespace condgen_fast::kd_loss

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def(
      "kd_loss_dense(Tensor student, Tensor? teacher, Tensor? labels, Tensor coefficient, int divergence, float hard, "
      "float soft, float temperature, float teacher_temperature, float jsd_beta, float label_smoothing, float z_loss, "
      "bool with_gradient, bool with_parts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "kd_loss_sparse(Tensor student, Tensor ids, Tensor probabilities, Tensor floor, Tensor? labels, "
      "Tensor coefficient, int divergence, float hard, float soft, float temperature, float teacher_temperature, "
      "float jsd_beta, float label_smoothing, float z_loss, bool with_gradient, bool with_parts) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "kd_loss_dense_over_logits(Tensor(a!) student, Tensor? teacher, Tensor? labels, Tensor coefficient, "
      "int divergence, float hard, float soft, float temperature, float teacher_temperature, float jsd_beta, "
      "float label_smoothing, float z_loss) -> Tensor");
  m.def(
      "kd_loss_sparse_over_logits(Tensor(a!) student, Tensor ids, Tensor probabilities, Tensor floor, Tensor? labels, "
      "Tensor coefficient, int divergence, float hard, float soft, float temperature, float teacher_temperature, "
      "float jsd_beta, float label_smoothing, float z_loss) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("kd_loss_dense", TORCH_BOX(&condgen_fast::kd_loss::kd_loss_dense_cpu));
  m.impl("kd_loss_dense_over_logits", TORCH_BOX(&condgen_fast::kd_loss::kd_loss_dense_over_logits_cpu));
  m.impl("kd_loss_sparse", TORCH_BOX(&condgen_fast::kd_loss::kd_loss_sparse_cpu));
  m.impl("kd_loss_sparse_over_logits", TORCH_BOX(&condgen_fast::kd_loss::kd_loss_sparse_over_logits_cpu));
}
