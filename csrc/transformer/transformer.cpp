// Schemas and CPU ops of a Transformer's forward pass: the order of the kernels, threads, checks and allocation.
#include "transformer.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"

namespace condgen_fast::transformer {
namespace {

struct Linear {
  Matrix weight;
  const float* bias;
};

struct Norm {
  const float *weight, *bias;
};

// What an op is given of a model, one after the other in the order of ops/transformer/op.py
class Weights {
 public:
  explicit Weights(const std::vector<Tensor>& tensors) : tensors_(tensors) {}

  Matrix matrix(int64_t rows, int64_t columns) {
    const Tensor& value = next();
    check_shape(value, "weights", {rows, columns});
    return as_matrix(value, "weights");
  }
  Linear linear(int64_t outputs, int64_t inputs) {
    const Matrix weight = matrix(outputs, inputs);
    return {weight, vector(outputs)};
  }
  Norm norm(int64_t width) {
    const float* weight = vector(width);
    return {weight, vector(width)};
  }
  int64_t left() const { return static_cast<int64_t>(tensors_.size() - used_); }
  // Of the tensor `ahead` places after the next
  int64_t size(int64_t ahead, int64_t dimension) const {
    CONDGEN_FAST_CHECK(ahead < left() && tensors_[used_ + ahead].dim() == 2, "weights are not those of the model");
    return tensors_[used_ + ahead].size(dimension);
  }

  static Matrix as_matrix(const Tensor& value, const char* name) {
    check_dtype(value, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    CONDGEN_FAST_CHECK(value.is_contiguous(), name, " must be contiguous");
    const Real type = value.scalar_type() == ScalarType::Float      ? Real::kFloat
                      : value.scalar_type() == ScalarType::BFloat16 ? Real::kBFloat16
                                                                    : Real::kHalf;
    return {value.data_ptr(), type, value.size(0), value.size(1)};
  }
  static const float* as_vector(const Tensor& value, const char* name, int64_t size) {
    check_shape(value, name, {size});
    check_dtype(value, name, {ScalarType::Float});
    CONDGEN_FAST_CHECK(value.is_contiguous(), name, " must be contiguous");
    return value.const_data_ptr<float>();
  }

 private:
  const Tensor& next() {
    CONDGEN_FAST_CHECK(left() > 0, "weights are not those of the model: too few");
    return tensors_[used_++];
  }
  const float* vector(int64_t size) { return as_vector(next(), "weights", size); }

  const std::vector<Tensor>& tensors_;
  size_t used_ = 0;
};

void run_linear(const float* in, int64_t rows, const Linear& layer, Activation activation, bool add, float* out) {
  const LinearArguments arguments{in, rows, layer.weight, layer.bias, activation, add, out};
  const int64_t panels = (layer.weight.rows + kPanel - 1) / kPanel;
  if (rows == 0) return;
  parallel_for(panels, kPanel * layer.weight.columns * rows,
               [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(linear, arguments, begin, end); });
}

// Keys and values [B, heads, S, width of a head] of each layer, key then value, as attention reads them
struct CrossSource {
  const float *keys, *values;
  int64_t position_stride, head_stride;
};

struct Cross {
  std::vector<CrossSource> layers;
  std::vector<int64_t> start, count;  // [B]
  int64_t longest = 1;
};

Cross cross_of(const std::vector<Tensor>& tensors, const Tensor& lengths, const Heads& heads) {
  Cross cross;
  if (tensors.empty()) return cross;
  const int64_t batch = lengths.size(0), positions = tensors[0].size(2), stride = tensors[0].stride(0);
  for (size_t i = 0; i < tensors.size(); i += 2) {
    CONDGEN_FAST_CHECK(i + 1 < tensors.size(), "cross must hold a key and a value for each layer");
    for (const Tensor& tensor : {tensors[i], tensors[i + 1]}) {
      check_shape(tensor, "cross", {batch, heads.count, positions, heads.width});
      check_dtype(tensor, "cross", {ScalarType::Float});
      CONDGEN_FAST_CHECK(heads.width == 1 || tensor.stride(3) == 1, "cross must have a contiguous last dimension");
      for (int64_t d = 0; d < 3; ++d) {
        CONDGEN_FAST_CHECK(tensor.size(d) <= 1 || tensor.stride(d) == tensors[i].stride(d),
                           "cross keys and values must have the same strides");
      }
    }
    CONDGEN_FAST_CHECK(batch <= 1 || tensors[i].stride(0) == stride, "cross must have the same strides in all layers");
    cross.layers.push_back({tensors[i].const_data_ptr<float>(), tensors[i + 1].const_data_ptr<float>(),
                            tensors[i].stride(2), tensors[i].stride(1)});
  }
  const int64_t* given = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    CONDGEN_FAST_CHECK(given[b] <= positions, "cross_lengths must be at most ", positions, "; got ", given[b]);
    cross.start.push_back(b * stride);
    cross.count.push_back(std::max<int64_t>(given[b], 1));  // as the models do with an empty source
    cross.longest = std::max(cross.longest, cross.count.back());
  }
  return cross;
}

struct Shape {
  int64_t width;
  Heads heads;
  bool norm_first;
  Activation activation;
};

// The rows of one pass and the memory that its layers share
class Pass {
 public:
  Pass(const Shape& shape, int64_t rows, int64_t widest)
      : shape_(shape),
        rows_(rows),
        state_(std::make_unique_for_overwrite<float[]>(rows * shape.width)),
        normal_(std::make_unique_for_overwrite<float[]>(rows * shape.width)),
        wide_(std::make_unique_for_overwrite<float[]>(rows * std::max(widest, 3 * shape.width))) {}

  void embed(const Matrix& embedding, const Matrix& positions, const int64_t* tokens, const int64_t* places) {
    for (int64_t i = 0; i < rows_; ++i) {
      CONDGEN_FAST_CHECK(tokens[i] >= 0 && tokens[i] < embedding.rows, "tokens must be in [0, ", embedding.rows,
                         "); got ", tokens[i]);
      CONDGEN_FAST_CHECK(places[i] < positions.rows, "tokens must fit the model's ", positions.rows,
                         " positions; got a sequence of ", places[i] + 1, " tokens");
    }
    const EmbedArguments arguments{
        tokens, places, embedding, positions, std::sqrt(static_cast<float>(shape_.width)), state_.get()};
    parallel_for(rows_, 4 * shape_.width,
                 [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(embed, arguments, begin, end); });
  }

  // attend(input [rows, 3 width]: query, key, value; out [rows, width])
  template <class Attend>
  void self_attention(Weights& weights, const Attend& attend) {
    const int64_t width = shape_.width;
    const Norm norm = weights.norm(width);
    const Linear input = weights.linear(3 * width, width), output = weights.linear(width, width);
    run_linear(enter(norm), rows_, input, Activation::kNone, false, wide_.get());
    attend(wide_.get(), normal_.get());
    run_linear(normal_.get(), rows_, output, Activation::kNone, true, state_.get());
    leave(norm);
  }

  void cross_attention(Weights& weights, const CrossSource& source, const Cross& cross, const int64_t* sentence) {
    const int64_t width = shape_.width;
    const Norm norm = weights.norm(width);
    const Linear query = weights.linear(width, width), output = weights.linear(width, width);
    run_linear(enter(norm), rows_, query, Activation::kNone, false, wide_.get());
    run_attention({wide_.get(), width, shape_.heads, source.keys, source.values, source.position_stride,
                   source.head_stride, sentence, cross.start.data(), cross.count.data(), normal_.get()},
                  cross.longest);
    run_linear(normal_.get(), rows_, output, Activation::kNone, true, state_.get());
    leave(norm);
  }

  void feed_forward(Weights& weights) {
    const int64_t width = shape_.width, inner_width = weights.size(2, 0);
    const Norm norm = weights.norm(width);
    const Linear inner = weights.linear(inner_width, width), outer = weights.linear(width, inner_width);
    run_linear(enter(norm), rows_, inner, shape_.activation, false, wide_.get());
    run_linear(wide_.get(), rows_, outer, Activation::kNone, true, state_.get());
    leave(norm);
  }

  void run_attention(const SentenceAttention& arguments, int64_t longest) {
    parallel_for(rows_, 4 * longest * shape_.width,
                 [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(attend, arguments, begin, end); });
  }

  // The rows after the last layer
  const float* finish(Weights& weights) {
    if (!shape_.norm_first) return state_.get();
    normalise(weights.norm(shape_.width), state_.get(), normal_.get());
    return normal_.get();
  }

 private:
  const float* enter(const Norm& norm) {
    if (!shape_.norm_first) return state_.get();
    normalise(norm, state_.get(), normal_.get());
    return normal_.get();
  }
  void leave(const Norm& norm) {
    if (!shape_.norm_first) normalise(norm, state_.get(), state_.get());
  }
  void normalise(const Norm& norm, const float* in, float* out) {
    const NormArguments arguments{in, shape_.width, norm.weight, norm.bias, 1e-5f, out};
    parallel_for(rows_, 4 * shape_.width,
                 [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(normalise, arguments, begin, end); });
  }

  Shape shape_;
  int64_t rows_;
  std::unique_ptr<float[]> state_, normal_, wide_;
};

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
  Pass pass(shape, rows, layers > 0 ? weights.size(14, 0) : 0);
  pass.embed(embedding, places, ids.const_data_ptr<int64_t>(), row_places.data());
  for (int64_t layer = 0; layer < layers; ++layer) {
    pass.self_attention(weights, [&](const float* input, float* out) {
      const CacheAttention arguments{
          input, shape.heads, parts.data(), layers, layer, table.const_data_ptr<int32_t>(), position, out};
      parallel_for(rows, 4 * (position + 1) * width,
                   [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(attend_cached, arguments, begin, end); });
    });
    pass.cross_attention(weights, sources.layers[layer], sources, sentence.data());
    pass.feed_forward(weights);
  }
  const float* last = pass.finish(weights);
  const Linear project{weights.matrix(vocab, width), nullptr};
  CONDGEN_FAST_CHECK(weights.left() == 0, "weights are not those of the model: too many");
  run_linear(last, rows, project, Activation::kNone, false, logits.mutable_data_ptr<float>());
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
  Pass pass(shape, rows, layers > 0 ? weights.size(per_layer - 4, 0) : 0);
  pass.embed(embedding, places, row_tokens.data(), row_places.data());
  for (int64_t layer = 0; layer < layers; ++layer) {
    pass.self_attention(weights, [&](const float* input, float* out) {
      pass.run_attention({input, 3 * width, shape.heads, input + width, input + 2 * width, 3 * width, shape.heads.width,
                          sentence.data(), start.data(), count.data(), out},
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
  run_linear(x.const_data_ptr<float>(), x.size(0), layer, Activation::kNone, false, out.mutable_data_ptr<float>());
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
