// Products of a few rows with a matrix of weights, which are read where they lie.
//
// The rows are the lanes: those of a block of kLanes rows stand side by side for each input, and each weight is
// broadcast to them. So a matrix as torch keeps it, outputs by inputs, needs no repacking (a copy that would have to
// follow every change of the weights); and every output is the sum of the same chains of kDepth multiply-adds along the
// inputs, in order, whichever tile it is computed in.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "lanes.h"

namespace condgen_fast::transformer::CONDGEN_FAST_ISA {
namespace {

constexpr int64_t kDepth = 256;               // inputs of a panel that are copied at a time
constexpr int64_t kPitch = kDepth + 16;       // floats from one of its rows to the next: spread over the cache's sets
constexpr int64_t kPackedBytes = 512 * 1024;  // of rows at a time, half of a common L2 cache
constexpr int64_t kMostRows = 256;
constexpr int kTile = 12;                         // outputs of a tile of one block
constexpr int kPairTile = kLanes == 16 ? 12 : 6;  // of a tile of two: accumulators take most of the registers
constexpr int64_t kStep = 16;                     // inputs between prefetches: floats of a cache line
// Weights are fetched this many bytes ahead, in the order of memory: a tile reads twelve rows at once, which the
// processor's own prefetching does not follow at the speed of memory.
constexpr uintptr_t kAhead = 32 * 1024;

// out[output][row] += sum over inputs of weights * x for a tile of kBlocks blocks of rows by kOutputs outputs
//   x        [kBlocks][x_block]: [depth][kLanes] each
//   weights  [kOutputs][pitch]
//   out      [kOutputs][out_pitch], blocks side by side; begins at zero where `first`
//   fetched  where the weights begin that are fetched meanwhile, as many as this tile's; 0: none
template <int kBlocks, int kOutputs>
inline void tile(const float* x, int64_t x_block, const float* weights, int64_t pitch, int64_t depth, bool first,
                 float* out, int64_t out_pitch, uintptr_t fetched) {
  Vec sum[kOutputs][kBlocks];
#pragma GCC unroll 12
  for (int j = 0; j < kOutputs; ++j) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      sum[j][b] = Vec(Floats{});
    }
  }
  const float* row[kOutputs];
#pragma GCC unroll 12
  for (int j = 0; j < kOutputs; ++j) row[j] = weights + j * pitch;
  const auto add = [&](int64_t k) {
    Vec value[kBlocks];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) value[b] = simd::load(x + b * x_block + k * kLanes);
#pragma GCC unroll 12
    for (int j = 0; j < kOutputs; ++j) {
      const Vec weight = broadcast(row[j][k]);
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) sum[j][b] = fma(weight, value[b], sum[j][b]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) {
    if (fetched != 0) {
#pragma GCC unroll 12
      for (int j = 0; j < kOutputs; ++j) {
        __builtin_prefetch(reinterpret_cast<const void*>(fetched + (k * kOutputs + j * kStep) * 4), 0, 2);
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStep; ++i) add(k + i);
  }
  for (; k < depth; ++k) add(k);
#pragma GCC unroll 12
  for (int j = 0; j < kOutputs; ++j) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      float* to = out + j * out_pitch + b * kLanes;
      simd::store(to, first ? sum[j][b] : simd::load(to) + sum[j][b]);
    }
  }
}

// packed [blocks][width][kLanes] of rows [count, width]; the last block is filled up with zeros
void pack(const float* rows, int64_t count, int64_t width, float* packed) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t lanes = std::min(kLanes, count - first);
    for (int64_t k = 0; k < width; k += kLanes) {
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = i < lanes ? load_up_to(rows + (first + i) * width + k, width - k) : Vec(Floats{});
      }
      transpose(square);
      for (int64_t i = 0; i < std::min(kLanes, width - k); ++i) {
        simd::store(packed + first * width + (k + i) * kLanes, square[i]);
      }
    }
  }
}

// 0.5 x (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, within 1.5e-7
Vec gelu(Vec x) {
  const Vec zero(Floats{}), size = simd::max(x, zero - x) * Vec(0.70710678f);
  const Vec t = Vec(1.0f) / fma(Vec(0.3275911f), size, Vec(1.0f));
  Vec p(1.061405429f);
  p = fma(p, t, Vec(-1.453152027f));
  p = fma(p, t, Vec(1.421413741f));
  p = fma(p, t, Vec(-0.284496736f));
  p = fma(p, t, Vec(0.254829592f));
  const Vec rest = p * t * simd::exp(zero - size * size);  // 1 - erf(size)
  return x * Vec(0.5f) * simd::select(x < zero, rest, Vec(2.0f) - rest);
}

// The rows [first, first + count) of a panel's outputs, from sums [outputs][blocks * kLanes]
void unpack(const LinearArguments& arguments, const float* sums, int64_t pitch, int64_t first, int64_t count,
            int64_t output, int64_t outputs) {
  const int64_t width = arguments.weight.rows;
  for (int64_t block = 0; block < count; block += kLanes) {
    for (int64_t j = 0; j < outputs; j += kLanes) {
      const int64_t columns = std::min(kLanes, outputs - j);
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        square[i] = i < columns ? simd::load(sums + (j + i) * pitch + block) : Vec(Floats{});
      }
      transpose(square);
      const Vec bias = arguments.bias == nullptr ? Vec(Floats{}) : load_up_to(arguments.bias + output + j, columns);
      for (int64_t i = 0; i < std::min(kLanes, count - block); ++i) {
        Vec y = square[i] + bias;
        if (arguments.activation == Activation::kRelu) y = simd::max(Vec(Floats{}), y);
        if (arguments.activation == Activation::kGelu) y = gelu(y);
        float* out = arguments.out + (first + block + i) * width + output + j;
        if (arguments.add) y = y + load_up_to(out, columns);
        store_up_to(out, y, columns);
      }
    }
  }
}

struct Scratch {
  std::vector<float> packed, panel = std::vector<float>(kPanel * kPitch), sums;
};

template <class T>
void product(const LinearArguments& arguments, const T* weights, Scratch& scratch, int64_t first, int64_t count,
             int64_t begin, int64_t end) {
  const int64_t inputs = arguments.weight.columns, outputs = arguments.weight.rows;
  const int64_t blocks = (count + kLanes - 1) / kLanes, pitch = blocks * kLanes;
  const float* x = scratch.packed.data();
  float* sums = scratch.sums.data();
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t output = panel * kPanel, width = std::min(kPanel, outputs - output);
    const T* rows = weights + output * inputs;
    uintptr_t next = 0, fetched = std::is_same_v<T, float> ? reinterpret_cast<uintptr_t>(rows) + kAhead : 0;
    if constexpr (std::is_same_v<T, float>) {
      if (blocks == 1 && width == kPanel) {  // each weight is needed once: not worth a copy
        for (int64_t j = 0; j < kPanel; j += kTile) {
          for (int64_t k = 0; k < inputs; k += kDepth) {
            const int64_t depth = std::min(kDepth, inputs - k);
            tile<1, kTile>(x + k * kLanes, 0, rows + j * inputs + k, inputs, depth, k == 0, sums + j * pitch, pitch,
                           fetched);
            fetched += kTile * depth * sizeof(T);
          }
        }
        unpack(arguments, sums, pitch, first, count, output, width);
        continue;
      }
    }
    float* copy = scratch.panel.data();
    for (int64_t k = 0; k < inputs; k += kDepth) {
      const int64_t depth = std::min(kDepth, inputs - k);
      for (int64_t j = 0; j < width; ++j) copy_row(rows + j * inputs + k, depth, copy + j * kPitch);
      for (int64_t j = width; j < kPanel; ++j) std::fill_n(copy + j * kPitch, depth, 0.0f);
      for (int64_t b = 0; b < blocks; b += 2) {
        const float* block = x + (b * inputs + k) * kLanes;
        const bool pair = b + 1 < blocks;
        for (int64_t j = 0; j < width; j += pair ? kPairTile : kTile) {
          float* to = sums + j * pitch + b * kLanes;
          if (pair) {
            tile<2, kPairTile>(block, inputs * kLanes, copy + j * kPitch, kPitch, depth, k == 0, to, pitch, fetched);
          } else {
            tile<1, kTile>(block, 0, copy + j * kPitch, kPitch, depth, k == 0, to, pitch, fetched);
          }
          if (fetched != 0) fetched += (pair ? kPairTile : kTile) * depth * sizeof(T);
        }
        if (b == 0) next = std::exchange(fetched, 0);
      }
      fetched = next;
    }
    unpack(arguments, sums, pitch, first, count, output, width);
  }
}

}  // namespace

void linear(const LinearArguments& arguments, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const int64_t inputs = arguments.weight.columns;
  const int64_t fitting = kPackedBytes / 4 / inputs / (2 * kLanes) * (2 * kLanes);
  const int64_t most = std::clamp(fitting, 2 * kLanes, kMostRows);
  for (int64_t first = 0; first < arguments.rows; first += most) {
    const int64_t count = std::min(most, arguments.rows - first);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    if (static_cast<int64_t>(scratch.packed.size()) < padded * inputs) scratch.packed.resize(padded * inputs);
    if (static_cast<int64_t>(scratch.sums.size()) < kPanel * padded) scratch.sums.resize(kPanel * padded);
    pack(arguments.in + first * inputs, count, inputs, scratch.packed.data());
    with_weights(arguments.weight,
                 [&](auto* weights) { product(arguments, weights, scratch, first, count, begin, end); });
  }
}

}  // namespace condgen_fast::transformer::CONDGEN_FAST_ISA
