// Attention of single rows, layer norm and embeddings.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

namespace condgen_fast::transformer::CONDGEN_FAST_ISA {
namespace {

struct Scratch {
  std::vector<const float*> keys, values;  // of each position, its first head
  std::vector<float> weights;

  void resize(int64_t positions) {
    if (static_cast<int64_t>(keys.size()) >= positions) return;
    keys.resize(positions);
    values.resize(positions);
    weights.resize((positions + kLanes - 1) / kLanes * kLanes);
  }
};

inline Vec products(const float* a, const float* b, int64_t count) {
  Vec sum(Floats{});
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum = fma(simd::load(a + i), simd::load(b + i), sum);
  if (i < count) sum = fma(load_up_to(a + i, count - i), load_up_to(b + i, count - i), sum);
  return sum;
}

// weights [positions] become softmax(weights) but for the division by what is returned
float exponentials(float* weights, int64_t positions) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  Vec most(kNothing);
  for (int64_t s = 0; s < positions; s += kLanes) {
    most = simd::max(simd::load_first(weights + s, std::min(kLanes, positions - s), kNothing), most);
  }
  const Vec highest(simd::reduce_max(most));
  Vec sum(Floats{});
  for (int64_t s = 0; s < positions; s += kLanes) {
    const int64_t count = std::min(kLanes, positions - s);
    const Vec e = simd::exp(simd::load_first(weights + s, count, kNothing) - highest);
    sum = sum + e;
    simd::store_first(weights + s, e, count);
  }
  return simd::reduce_sum(sum);
}

// kVectors vectors of the output from `values` on
template <int kVectors>
inline void weighted_sum(const float* weights, const float* const* values, int64_t offset, int64_t positions,
                         Vec factor, float* out) {
  Vec sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sum[v] = Vec(Floats{});
  for (int64_t s = 0; s < positions; ++s) {
    const Vec weight = broadcast(weights[s]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(weight, simd::load(values[s] + offset + v * kLanes), sum[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) simd::store(out + v * kLanes, sum[v] * factor);
}

void attend_row(const float* query, const Heads& heads, Scratch& scratch, int64_t positions, int64_t head_stride,
                float* out) {
  float* weights = scratch.weights.data();
  const float* const* values = scratch.values.data();
  for (int64_t head = 0; head < heads.count; ++head) {
    const int64_t offset = head * head_stride;
    const float* q = query + head * heads.width;
    float* to = out + head * heads.width;
    for (int64_t s = 0; s < positions; s += kLanes) {
      Vec parts[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        parts[i] = s + i < positions ? products(q, scratch.keys[s + i] + offset, heads.width) : Vec(Floats{});
      }
      simd::store(weights + s, sums(parts) * Vec(heads.scale));
    }
    const Vec factor(1.0f / exponentials(weights, positions));
    int64_t d = 0;
    for (; d + 4 * kLanes <= heads.width; d += 4 * kLanes) {
      weighted_sum<4>(weights, values, offset + d, positions, factor, to + d);
    }
    for (; d + kLanes <= heads.width; d += kLanes) {
      weighted_sum<1>(weights, values, offset + d, positions, factor, to + d);
    }
    if (d == heads.width) continue;
    Vec sum(Floats{});
    for (int64_t s = 0; s < positions; ++s) {
      sum = fma(broadcast(weights[s]), load_up_to(values[s] + offset + d, heads.width - d), sum);
    }
    store_up_to(to + d, sum * factor, heads.width - d);
  }
}

}  // namespace

void attend(const SentenceAttention& a, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sentence = a.sentence[row], positions = a.count[sentence];
    scratch.resize(positions);
    for (int64_t s = 0; s < positions; ++s) {
      scratch.keys[s] = a.keys + a.start[sentence] + s * a.position_stride;
      scratch.values[s] = a.values + a.start[sentence] + s * a.position_stride;
    }
    attend_row(a.query + row * a.query_stride, a.heads, scratch, positions, a.head_stride,
               a.out + row * a.heads.count * a.heads.width);
  }
}

void attend_cached(const CacheAttention& a, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const int64_t width = a.heads.count * a.heads.width, positions = a.position + 1;
  scratch.resize(positions);
  for (int64_t row = begin; row < end; ++row) {
    const CachePart* part = a.parts;
    int64_t before = 0;  // positions of earlier parts
    for (int64_t s = 0; s < positions; ++s) {
      if (s == before + part->positions) before += (part++)->positions;
      const int64_t slot = s < a.position ? a.slots[row * a.position + s] : row;
      float* key = part->data + (((s - before) * a.layers + a.layer) * 2 * part->rows + slot) * width;
      float* value = key + part->rows * width;
      scratch.keys[s] = key;
      scratch.values[s] = value;
      if (s < a.position) continue;
      std::memcpy(key, a.input + row * 3 * width + width, width * sizeof(float));
      std::memcpy(value, a.input + row * 3 * width + 2 * width, width * sizeof(float));
    }
    attend_row(a.input + row * 3 * width, a.heads, scratch, positions, a.heads.width, a.out + row * width);
  }
}

void normalise(const NormArguments& a, int64_t begin, int64_t end) {
  const float share = 1.0f / static_cast<float>(a.width);
  for (int64_t row = begin; row < end; ++row) {
    const float* in = a.in + row * a.width;
    float* out = a.out + row * a.width;
    Vec sum(Floats{}), squares(Floats{});
    for (int64_t i = 0; i < a.width; i += kLanes) sum = sum + load_up_to(in + i, a.width - i);
    const float mean = simd::reduce_sum(sum) * share;
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const int64_t count = a.width - i;
      const Vec x = (count >= kLanes ? simd::load(in + i) : simd::load_first(in + i, count, mean)) - Vec(mean);
      squares = fma(x, x, squares);
    }
    const Vec factor(1.0f / std::sqrt(simd::reduce_sum(squares) * share + a.epsilon));
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const int64_t count = a.width - i;
      const Vec x = (load_up_to(in + i, count) - Vec(mean)) * factor;
      store_up_to(out + i, fma(x, load_up_to(a.weight + i, count), load_up_to(a.bias + i, count)), count);
    }
  }
}

void embed(const EmbedArguments& a, int64_t begin, int64_t end) {
  const int64_t width = a.embedding.columns;
  for (int64_t row = begin; row < end; ++row) {
    float* out = a.out + row * width;
    with_weights(a.positions, [&](auto* from) { copy_row(from + a.places[row] * width, width, out); });
    with_weights(a.embedding, [&](auto* from) {
      for (int64_t i = 0; i < width; ++i) out[i] += a.scale * simd::to_float(from[a.tokens[row] * width + i]);
    });
  }
}

}  // namespace condgen_fast::transformer::CONDGEN_FAST_ISA
