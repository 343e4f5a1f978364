// Schemas of the refinement family, and its CPU ops: threads over rows. row_stats on a GPU is Triton's.
#include "refinement/refinement.h"

#include <cmath>
#include <type_traits>

#include "common/parallel.h"
#include "refinement/refinement_tensors.h"

namespace condgen_fast::refinement {
namespace {

template <class Call>
void with_logit_type(const Tensor& logits, const Call& call) {
  check_dtype(logits, "logits", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return call(std::type_identity<float>{});
    case ScalarType::BFloat16:
      return call(std::type_identity<simd::BFloat16>{});
    case ScalarType::Half:
      return call(std::type_identity<simd::Half>{});
    default:
      return call(std::type_identity<double>{});
  }
}

using Stats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Stats row_stats_cpu(const Tensor& logits,                       // [N, V]
                    const std::optional<Tensor>& rows,          // [M]
                    const std::optional<Tensor>& temperature,   // [1] or [M]
                    const std::optional<Tensor>& seed,          // [1]
                    const std::optional<Tensor>& noise_rows) {  // [M]
  check_shape(logits, "logits", {-1, -1});
  const int64_t height = logits.size(0), width = logits.size(1);
  CONDGEN_FAST_CHECK(width >= 1, "logits must have V at least 1; got ", width);
  CONDGEN_FAST_CHECK(temperature.has_value() == seed.has_value(), "temperature and seed must be given together");
  const int64_t count = rows ? rows->size(0) : height;
  const Tensor x = width == 1 || logits.stride(1) == 1 ? logits : torch::stable::contiguous(logits);
  std::optional<Tensor> wanted, temperatures, noise;
  if (rows) {
    wanted = checked(*rows, "rows", ScalarType::Long, {-1}, logits);
    const int64_t* row = wanted->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) {
      CONDGEN_FAST_CHECK(row[i] >= 0 && row[i] < height, "rows must be in [0, ", height, "); got ", row[i]);
    }
  }
  uint64_t key = 0;
  if (temperature) {
    const int64_t each = temperature->dim() == 1 && temperature->size(0) == 1 ? 1 : count;
    temperatures = checked(*temperature, "temperature", ScalarType::Float, {each}, logits);
    const float* value = temperatures->const_data_ptr<float>();
    for (int64_t i = 0; i < each; ++i) {
      CONDGEN_FAST_CHECK(value[i] != INFINITY, "temperature must be finite; got ", value[i]);
    }
    key = static_cast<uint64_t>(*checked(*seed, "seed", ScalarType::Long, {1}, logits).const_data_ptr<int64_t>());
  }
  if (noise_rows) noise = checked(*noise_rows, "noise_rows", ScalarType::Long, {count}, logits);
  Tensor token = torch::stable::new_empty(logits, {count}, ScalarType::Long);
  Tensor log_prob = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  Tensor margin = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {count}, ScalarType::Float);
  Tensor best = torch::stable::new_empty(logits, {temperature ? count : 0}, ScalarType::Long);
  with_logit_type(logits, [&](auto type) {
    using Logit = typename decltype(type)::type;
    RowStatsArguments<Logit> arguments;
    arguments.logits = static_cast<const Logit*>(x.data_ptr());
    arguments.stride = x.stride(0);
    arguments.width = width;
    arguments.rows = wanted ? wanted->const_data_ptr<int64_t>() : nullptr;
    arguments.temperature = temperatures ? temperatures->const_data_ptr<float>() : nullptr;
    arguments.temperature_step = temperatures && temperatures->size(0) == count ? 1 : 0;
    arguments.seed = key;
    arguments.noise_rows = noise ? noise->const_data_ptr<int64_t>() : nullptr;
    arguments.token = token.mutable_data_ptr<int64_t>();
    arguments.log_prob = log_prob.mutable_data_ptr<float>();
    arguments.margin = margin.mutable_data_ptr<float>();
    arguments.entropy = entropy.mutable_data_ptr<float>();
    arguments.best = temperature ? best.mutable_data_ptr<int64_t>() : nullptr;
    parallel_for(count, width,
                 [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(row_stats, arguments, begin, end); });
  });
  return {token, log_prob, margin, entropy, best};
}

constexpr int64_t kSelectionWork = 8;  // simple operations a position

Tensor remask_cpu(const Tensor& scores, const Tensor& count, const Tensor& maskable) {
  return remask_op(scores, count, maskable, [](const RemaskArguments& arguments, int64_t batch) {
    parallel_for(batch, kSelectionWork * arguments.width,
                 [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(remask, arguments, begin, end); });
  });
}

std::tuple<Tensor, Tensor> commit_cpu(const Tensor& token, const Tensor& ranking, const Tensor& canvas,
                                      const Tensor& maskable, const std::optional<Tensor>& minimum,
                                      const std::optional<Tensor>& bound, const std::optional<Tensor>& active,
                                      int64_t least, double limit, int64_t policy) {
  return commit_op(token, ranking, canvas, maskable, minimum, bound, active, least, limit, policy,
                   [](const auto& arguments, int64_t batch) {
                     parallel_for(batch, kSelectionWork * arguments.width, [&](int64_t begin, int64_t end) {
                       CONDGEN_FAST_CPU_CALL(commit, arguments, begin, end);
                     });
                   });
}

}  // namespace
}  // namespace condgen_fast::refinement

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def(
      "row_stats(Tensor logits, Tensor? rows, Tensor? temperature, Tensor? seed, Tensor? noise_rows=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("remask(Tensor scores, Tensor count, Tensor maskable) -> Tensor");
  m.def(
      "commit(Tensor token, Tensor ranking, Tensor canvas, Tensor maskable, Tensor? minimum, Tensor? bound, "
      "Tensor? active, int least, float limit, int policy) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&condgen_fast::refinement::row_stats_cpu));
  m.impl("remask", TORCH_BOX(&condgen_fast::refinement::remask_cpu));
  m.impl("commit", TORCH_BOX(&condgen_fast::refinement::commit_cpu));
}
