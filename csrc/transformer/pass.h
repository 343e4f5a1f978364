// The layers of a Transformer over some rows: the order of the kernels, and what of each a thread does.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/team.h"
#include "weights.h"

namespace condgen_fast::transformer {

inline void run_linear(Team& team, const float* in, int64_t rows, const Linear& layer, Activation activation, bool add,
                       float* out) {
  const LinearArguments arguments{in, rows, layer.weight, layer.bias, activation, add, out};
  const int64_t panels = (layer.weight.rows + kPanel - 1) / kPanel;
  if (rows == 0) return;
  team.share(panels, kPanel * layer.weight.columns * rows,
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

inline Cross cross_of(const std::vector<Tensor>& tensors, const Tensor& lengths, const Heads& heads) {
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
  Pass(Team& team, const Shape& shape, int64_t rows, int64_t widest)
      : team_(team),
        shape_(shape),
        rows_(rows),
        state_(std::make_unique_for_overwrite<float[]>(rows * shape.width)),
        normal_(std::make_unique_for_overwrite<float[]>(rows * shape.width)),
        wide_(std::make_unique_for_overwrite<float[]>(rows * std::max(widest, 3 * shape.width))) {}

  void embed(const Matrix& embedding, const Matrix& positions, const int64_t* tokens, const int64_t* places) {
    for (int64_t i = 0; i < rows_; ++i) {
      CONDGEN_FAST_CHECK(tokens[i] >= 0 && tokens[i] < embedding.rows, "tokens must be in [0, ", embedding.rows,
                         "); got ", tokens[i]);
    }
    const int64_t longest = *std::max_element(places, places + rows_) + 1;
    CONDGEN_FAST_CHECK(longest <= positions.rows, "tokens must fit the model's ", positions.rows,
                       " positions; got a sequence of ", longest, " tokens");
    const EmbedArguments arguments{
        tokens, places, embedding, positions, std::sqrt(static_cast<float>(shape_.width)), state_.get()};
    team_.share(rows_, 4 * shape_.width,
                [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(embed, arguments, begin, end); });
  }

  // attend(input [rows, 3 width]: query, key, value; out [rows, width])
  template <class Attend>
  void self_attention(Weights& weights, const Attend& attend) {
    const int64_t width = shape_.width;
    const Norm norm = weights.norm(width);
    const Linear input = weights.linear(3 * width, width), output = weights.linear(width, width);
    run_linear(team_, enter(norm), rows_, input, Activation::kNone, false, wide_.get());
    attend(wide_.get(), normal_.get());
    run_linear(team_, normal_.get(), rows_, output, Activation::kNone, true, state_.get());
    leave(norm);
  }

  void cross_attention(Weights& weights, const CrossSource& source, const Cross& cross, const int64_t* sentence) {
    const int64_t width = shape_.width;
    const Norm norm = weights.norm(width);
    const Linear query = weights.linear(width, width), output = weights.linear(width, width);
    run_linear(team_, enter(norm), rows_, query, Activation::kNone, false, wide_.get());
    run_attention({wide_.get(), width, shape_.heads, source.keys, source.values, source.position_stride,
                   source.head_stride, sentence, cross.start.data(), cross.count.data(), normal_.get()},
                  cross.longest);
    run_linear(team_, normal_.get(), rows_, output, Activation::kNone, true, state_.get());
    leave(norm);
  }

  void feed_forward(Weights& weights) {
    const int64_t width = shape_.width, inner_width = weights.size(2, 0);
    const Norm norm = weights.norm(width);
    const Linear inner = weights.linear(inner_width, width), outer = weights.linear(width, inner_width);
    run_linear(team_, enter(norm), rows_, inner, shape_.activation, false, wide_.get());
    run_linear(team_, wide_.get(), rows_, outer, Activation::kNone, true, state_.get());
    leave(norm);
  }

  void run_attention(const SentenceAttention& arguments, int64_t longest) {
    team_.share(rows_, 4 * longest * shape_.width,
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
    team_.share(rows_, 4 * shape_.width,
                [&](int64_t begin, int64_t end) { CONDGEN_FAST_CPU_CALL(normalise, arguments, begin, end); });
  }

  Team& team_;
  Shape shape_;
  int64_t rows_;
  std::unique_ptr<float[]> state_, normal_, wide_;
};

}  // namespace condgen_fast::transformer
