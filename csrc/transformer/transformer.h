// Kernels of a Transformer's forward pass on the CPU. Activations are float, row-major, one row a token; each row's
// result has the same bits whatever the other rows, their number and the threads.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"

namespace condgen_fast::transformer {

enum class Real { kFloat, kBFloat16, kHalf };
enum class Activation { kNone, kRelu, kGelu };

// Weights as torch.nn.Linear and torch.nn.Embedding hold them, row-major
struct Matrix {
  const void* data;
  Real type;
  int64_t rows, columns;
};

// out = activation(in weight^T + bias), added to what out holds where `add`
struct LinearArguments {
  const float* in;  // [rows, inputs]
  int64_t rows;
  Matrix weight;      // [outputs, inputs]
  const float* bias;  // [outputs], or none
  Activation activation;
  bool add;
  float* out;  // [rows, outputs]
};
constexpr int64_t kPanel = 32;  // outputs that are computed together; threads share a product by panels

// out = weight * (in - mean) / sqrt(variance + epsilon) + bias, row by row; out may be in
struct NormArguments {
  const float* in;  // [rows, width]
  int64_t width;
  const float *weight, *bias;  // [width]
  float epsilon;
  float* out;
};

// out = scale * embedding[token] + positions[place]
struct EmbedArguments {
  const int64_t* tokens;  // [rows]
  const int64_t* places;  // [rows]
  Matrix embedding, positions;
  float scale;
  float* out;  // [rows, width]
};

struct Heads {
  int64_t count, width;
  float scale;
};

// Attention of rows to the positions of the sentence that each belongs to
struct SentenceAttention {
  const float* query;  // [rows, query_stride]
  int64_t query_stride;
  Heads heads;
  const float *keys, *values;
  int64_t position_stride, head_stride;  // of keys and values
  const int64_t* sentence;               // [rows]
  const int64_t* start;                  // [sentences] where a sentence's first position is in keys and values
  const int64_t* count;                  // [sentences] its positions
  float* out;                            // [rows, heads * width]
};

// Positions of a cache that were allocated together, [positions, layers, 2, rows, width]: keys, then values
struct CachePart {
  float* data;
  int64_t positions, rows;
};

// Attention of each row to its earlier tokens, wherever in the cache they lie, and to itself; puts the row's key and
// value into the cache.
struct CacheAttention {
  const float* input;  // [rows, 3 width]: query, key, value
  Heads heads;
  const CachePart* parts;
  int64_t layers, layer;
  const int32_t* slots;  // [rows, position]: the cache's row for each earlier token
  int64_t position;      // of this token
  float* out;            // [rows, width]
};

CONDGEN_FAST_CPU_DECLARE(
    // Panels [begin, end) of all rows.
    void linear(const LinearArguments& arguments, int64_t begin, int64_t end);
    // Rows [begin, end).
    void normalise(const NormArguments& arguments, int64_t begin, int64_t end);
    void embed(const EmbedArguments& arguments, int64_t begin, int64_t end);
    void attend(const SentenceAttention& arguments, int64_t begin, int64_t end);
    void attend_cached(const CacheAttention& arguments, int64_t begin, int64_t end);)

}  // namespace condgen_fast::transformer
