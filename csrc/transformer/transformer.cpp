// Schemas and CPU ops of a Transformer's forward pass: what they are given, checks and allocation.
#include "transformer.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "pass.h"

namespace condgen_fast::transformer {
namespace {

Shape shape_of(int64_t width, int64_t heads, bool norm_first, bool gelu) {
  CONDGEN_FAST_CHECK(heads >= 1 && width >= 1 && width % heads == 0, "heads must divide the width ", width, "; got ",
                     heads);
  const int64_t head_width = width / heads;
  return {width,
          {heads, head_width, 1.0f / std::sqrt(static_cast<float>(head_width))},
          norm_first,
          gelu ? Activation::kGelu : Activation::kRelu};
}

void check_lengths(const Tensor& lengths, const char* name, int64_t batch) {
  check_shape(lengths, name, {batch});
  check_dtype(lengths, name, {ScalarType::Long});
}

Tensor transformer_step_cpu(const Tensor& tokens,              // [B, K] int64
                            const Tensor& slots,               // [B * K, t] int32
                            const std::vector<Tensor>& cache,  // [positions, layers, 2, rows, D] float32 each
                            const std::vector<Tensor>& cross,  // per layer a key, a value [B, heads, S, D / heads]
                            const Tensor& cross_lengths,       // [B] int64
                            const std::vector<Tensor>& weight_list,  //
                            int64_t head_count, bool norm_first, bool gelu) {
  check_shape(tokens, "tokens", {-1, -1});
  check_dtype(tokens, "tokens", {ScalarType::Long});
  const int64_t batch = tokens.size(0), beam = tokens.size(1), rows = batch * beam;
  check_shape(slots, "slots", {rows, -1});
  check_dtype(slots, "slots", {ScalarType::Int});
  check_lengths(cross_lengths, "cross_lengths", batch);
  const Tensor ids = torch::stable::contiguous(tokens), table = torch::stable::contiguous(slots),
               lengths = torch::stable::contiguous(cross_lengths);
  const int64_t position = slots.size(1), layers = static_cast<int64_t>(cross.size()) / 2;

  Weights weights(weight_list);
  const int64_t vocab = weights.size(0, 0), width = weights.size(0, 1);
  const Shape shape = shape_of(width, head_count, norm_first, gelu);
  const Matrix embedding = weights.matrix(vocab, width), places = weights.matrix(weights.size(0, 0), width);
  const Cross sources = cross_of(cross, lengths, shape.heads);

  std::vector<CachePart> parts;
  int64_t positions = 0;
  for (const Tensor& part : cache) {
    check_shape(part, "cache", {-1, layers, 2, -1, width});
    check_dtype(part, "cache", {ScalarType::Float});
    CONDGEN_FAST_CHECK(part.is_contiguous(), "cache must be contiguous");
    parts.push_back({part.mutable_data_ptr<float>(), part.size(0), part.size(3)});
    positions += part.size(0);
    const int64_t used = std::min(position, positions);
    for (int64_t s = positions - part.size(0); s < used; ++s) {
      for (int64_t row = 0; row < rows; ++row) {
        const int32_t slot = table.const_data_ptr<int32_t>()[row * position + s];
        CONDGEN_FAST_CHECK(slot >= 0 && slot < part.size(3), "slots must be rows of the cache; got ", slot);
      }
    }
  }
  CONDGEN_FAST_CHECK(
      position < positions && parts.back().rows >= rows && positions - parts.back().positions <= position,
      "cache must have a place for ", rows, " rows at position ", position);

  Tensor logits = torch::stable::new_empty(cache[0], {batch, beam, vocab});
  if (rows == 0) return logits;
  const std::vector<int64_t> row_places(rows, position);
  std::vector<int64_t> sentence(rows);
  for (int64_t row = 0; row < rows; ++row) sentence[row] = row / beam;
  Team::lead([&](Team& team) {
    Pass pass(team, shape, rows, layers > 0 ? weights.size(14, 0) : 0);
    pass.embed(embedding, places, ids.const_data_ptr<int64_t>(), row_places.data());
    for (int64_t layer = 0; layer < layers; ++layer) {
      pass.self_attention(weights, [&](const float* input, float* out) {
        const CacheAttention arguments{
            input, shape.heads, parts.data(), layers, layer, table.const_data_ptr<int32_t>(), position, out};
        team.share(rows, 4 * (position + 1) * width,
                   [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(attend_cached, arguments, begin, end); });
      });
      pass.cross_attention(weights, sources.layers[layer], sources, sentence.data());
      pass.feed_forward(weights);
    }
    const float* last = pass.finish(weights);
    const Linear project{weights.matrix(vocab, width), nullptr};
    CONDGEN_FAST_CHECK(weights.left() == 0, "weights are not those of the model: too many");
    run_linear(team, last, rows, project, Activation::kNone, false, logits.mutable_data_ptr<float>());
  });
  return logits;
}

Tensor transformer_pass_cpu(const Tensor& tokens,                    // [B, L] int64
                            const Tensor& lengths,                   // [B] int64
                            const std::vector<Tensor>& cross,        // as in a step, or none
                            const Tensor& cross_lengths,             // [B] int64
                            const std::vector<Tensor>& weight_list,  //
                            int64_t head_count, bool norm_first, bool gelu) {
  check_shape(tokens, "tokens", {-1, -1});
  check_dtype(tokens, "tokens", {ScalarType::Long});
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  check_lengths(lengths, "lengths", batch);
  check_lengths(cross_lengths, "cross_lengths", batch);
  const Tensor ids = torch::stable::contiguous(tokens), counts = torch::stable::contiguous(lengths),
               cross_counts = torch::stable::contiguous(cross_lengths);

  Weights weights(weight_list);
  const int64_t width = weights.size(0, 1);
  const Shape shape = shape_of(width, head_count, norm_first, gelu);
  const Matrix embedding = weights.matrix(weights.size(0, 0), width),
               places = weights.matrix(weights.size(0, 0), width);
  const Cross sources = cross_of(cross, cross_counts, shape.heads);

  // only real tokens are rows
  std::vector<int64_t> row_tokens, row_places, sentence, start(batch), count(batch);
  for (int64_t b = 0; b < batch; ++b) {
    count[b] = counts.const_data_ptr<int64_t>()[b];
    CONDGEN_FAST_CHECK(count[b] >= 0 && count[b] <= length, "lengths must be in [0, ", length, "]; got ", count[b]);
    start[b] = static_cast<int64_t>(row_tokens.size()) * 3 * width;
    for (int64_t i = 0; i < count[b]; ++i) {
      row_tokens.push_back(ids.const_data_ptr<int64_t>()[b * length + i]);
      row_places.push_back(i);
      sentence.push_back(b);
    }
  }
  const int64_t rows = static_cast<int64_t>(row_tokens.size());
  const int64_t longest = batch > 0 ? *std::max_element(count.begin(), count.end()) : 0;
  Tensor states = torch::stable::new_zeros(ids, {batch, length, width}, ScalarType::Float);
  if (rows == 0) return states;
  const bool with_cross = !cross.empty();
  const int64_t per_layer = with_cross ? 18 : 12, layers = weights.left() / per_layer;
  CONDGEN_FAST_CHECK(weights.left() == layers * per_layer + 2 * norm_first, "weights are not those of the model");
  CONDGEN_FAST_CHECK(!with_cross || static_cast<int64_t>(sources.layers.size()) == layers, "cross must be of ", layers,
                     " layers; got ", sources.layers.size());
  Team::lead([&](Team& team) {
    Pass pass(team, shape, rows, layers > 0 ? weights.size(per_layer - 4, 0) : 0);
    pass.embed(embedding, places, row_tokens.data(), row_places.data());
    for (int64_t layer = 0; layer < layers; ++layer) {
      pass.self_attention(weights, [&](const float* input, float* out) {
        pass.run_attention({input, 3 * width, shape.heads, input + width, input + 2 * width, 3 * width,
                            shape.heads.width, sentence.data(), start.data(), count.data(), out},
                           longest);
      });
      if (with_cross) pass.cross_attention(weights, sources.layers[layer], sources, sentence.data());
      pass.feed_forward(weights);
    }
    const float* last = pass.finish(weights);
    float* out = states.mutable_data_ptr<float>();
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(last + row * width, width, out + (sentence[row] * length + row_places[row]) * width);
    }
  });
  return states;
}

Tensor linear_cpu(const Tensor& input,   // [N, inputs]
                  const Tensor& weight,  // [outputs, inputs]
                  const std::optional<Tensor>& bias) {
  check_shape(weight, "weight", {-1, -1});
  check_shape(input, "input", {-1, weight.size(1)});
  check_dtype(input, "input", {ScalarType::Float});
  const Tensor x = torch::stable::contiguous(input);
  const Linear layer{Weights::as_matrix(weight, "weight"),
                     bias ? Weights::as_vector(*bias, "bias", weight.size(0)) : nullptr};
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (out.numel() == 0) return out;
  CONDGEN_FAST_CHECK(weight.size(1) > 0, "weight must have columns");
  Team::lead([&](Team& team) {
    run_linear(team, x.const_data_ptr<float>(), x.size(0), layer, Activation::kNone, false,
               out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace
}  // namespace condgen_fast::transformer

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) {
  m.def(
      "transformer_step(Tensor tokens, Tensor slots, Tensor(a!)[] cache, Tensor[] cross, Tensor cross_lengths, "
      "Tensor[] weights, int heads, bool norm_first, bool gelu) -> Tensor");
  m.def(
      "transformer_pass(Tensor tokens, Tensor lengths, Tensor[] cross, Tensor cross_lengths, Tensor[] weights, "
      "int heads, bool norm_first, bool gelu) -> Tensor");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CPU, m) {
  m.impl("transformer_step", TORCH_BOX(&condgen_fast::transformer::transformer_step_cpu));
  m.impl("transformer_pass", TORCH_BOX(&condgen_fast::transformer::transformer_pass_cpu));
  m.impl("linear", TORCH_BOX(&condgen_fast::transformer::linear_cpu));
}
