// Products of rows with a matrix of weights, which are read where they lie.
//
// The outputs are the lanes: squares of kLanes outputs by kLanes inputs are transposed on their way from memory, and
// the rows' inputs are broadcast to them. So a matrix as torch keeps it, outputs by inputs, needs no repacking (a copy
// that would have to follow every change of the weights). Every output is the sum of the same chains of kDepth
// multiply-adds along the inputs, in order, whichever tile it is computed in.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"

namespace condgen_fast::transformer::CONDGEN_FAST_ISA {
namespace {

constexpr int64_t kDepth = 256;               // inputs of a chain
constexpr int64_t kPackedBytes = 512 * 1024;  // of rows at a time, half of a common L2 cache
constexpr int64_t kMostRows = 256;
// Rows that multiply a square of weights as soon as it is transposed; more need it again, from a copy.
constexpr int64_t kFew = kLanes == 16 ? 12 : kLanes;
constexpr int64_t kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // accumulators take most of the registers
constexpr int kTileVectors = 2;
constexpr int64_t kTileOutputs = kTileVectors * kLanes;
// Weights are fetched this many squares ahead, in the order of their use: a square reads kLanes rows at once, which the
// processor's own prefetching does not follow at the speed of memory. And again at half the way: what is asked for
// while too much is on its way is dropped.
constexpr int64_t kAhead = 16;

// Lane j of square[i] is the weight of output j and input i, for `outputs` and `inputs` of them
template <class T>
inline void load_square(const T* weights, int64_t pitch, int64_t outputs, int64_t inputs, Vec (&square)[kLanes]) {
  if (outputs >= kLanes && inputs >= kLanes) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < kLanes; ++j) square[j] = simd::load(weights + j * pitch);
  } else {
    for (int64_t j = 0; j < kLanes; ++j) {
      square[j] = j < outputs ? simd::load_first(weights + j * pitch, std::min(inputs, kLanes), 0.0f) : Vec(Floats{});
    }
  }
  transpose(square);
}

// Fetches the square at an address, which may lie beyond the weights; `pitch` in bytes.
inline void fetch_square(uintptr_t address, int64_t pitch) {
#pragma GCC unroll 16
  for (int64_t j = 0; j < kLanes; ++j) __builtin_prefetch(reinterpret_cast<const void*>(address + j * pitch));
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

// Outputs [output, output + kLanes) of a row, as far as there are so many
inline void finish(const LinearArguments& arguments, int64_t row, int64_t output, Vec sum) {
  const int64_t width = arguments.weight.rows, count = width - output;
  Vec y = sum + (arguments.bias == nullptr ? Vec(Floats{}) : load_up_to(arguments.bias + output, count));
  if (arguments.activation == Activation::kRelu) y = simd::max(Vec(Floats{}), y);
  if (arguments.activation == Activation::kGelu) y = gelu(y);
  float* out = arguments.out + row * width + output;
  if (arguments.add) y = y + load_up_to(out, count);
  store_up_to(out, y, count);
}

// --- A few rows ------------------------------------------------------------------------------------------------------

// Outputs [begin, end) of kRows rows from row `first` on; x [inputs][kRows]
template <int kRows, class T>
void few_rows(const LinearArguments& arguments, const T* weights, const float* x, int64_t first, int64_t begin,
              int64_t end) {
  const int64_t inputs = arguments.weight.columns;
  for (int64_t output = begin; output < end; output += kLanes) {
    const T* row = weights + output * inputs;
    const int64_t outputs = end - output, pitch = inputs * sizeof(T);
    Vec total[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) total[r] = Vec(Floats{});
    for (int64_t start = 0; start < inputs; start += kDepth) {
      Vec sum[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r] = Vec(Floats{});
      for (int64_t k = start; k < std::min(inputs, start + kDepth); k += kLanes) {
        const int64_t depth = std::min(kLanes, inputs - k);
        for (const int64_t ahead : {kAhead, kAhead / 2}) {
          // beyond the end of its row is the next, which is read already: that kLanes below it begins
          const uintptr_t fetched = reinterpret_cast<uintptr_t>(row + k) + ahead * kLanes * sizeof(T);
          fetch_square(k + ahead * kLanes < inputs ? fetched : fetched + (kLanes - 1) * pitch, pitch);
        }
        Vec square[kLanes];
        load_square(row + k, inputs, outputs, depth, square);
        if (depth == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) sum[r] = fma(broadcast(x[(k + i) * kRows + r]), square[i], sum[r]);
          }
        } else {
          for (int i = 0; i < depth; ++i) {
            for (int r = 0; r < kRows; ++r) sum[r] = fma(broadcast(x[(k + i) * kRows + r]), square[i], sum[r]);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) total[r] = start == 0 ? sum[r] : total[r] + sum[r];
    }
    for (int r = 0; r < kRows; ++r) finish(arguments, first + r, output, total[r]);
  }
}

// --- Many rows -------------------------------------------------------------------------------------------------------

// Lines of memory that a tile fetches while it computes: one of each of `rows` rows every kLanes inputs
struct Fetched {
  uintptr_t first;
  int64_t rows, pitch, step;  // in bytes
};

// sums[row][output] += sum over inputs of weights * x for kRows rows by kTileVectors vectors of outputs
//   x        [depth][kRows]
//   weights  [depth][kTileOutputs]
//   sums     [kRows][kPanel]; begins at zero where `first`
template <int kRows>
void tile(const float* x, const float* weights, int64_t depth, bool first, float* sums, const Fetched& fetched) {
  Vec sum[kRows][kTileVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Vec(Floats{});
  }
  const auto add = [&](int64_t k) {
    Vec weight[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) weight[v] = simd::load(weights + k * kTileOutputs + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vec value = broadcast(x[k * kRows + r]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = fma(value, weight[v], sum[r][v]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    for (int64_t j = 0; j < fetched.rows; ++j) {
      __builtin_prefetch(reinterpret_cast<const void*>(fetched.first + j * fetched.pitch + k * fetched.step), 0, 2);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLanes; ++i) add(k + i);
  }
  for (; k < depth; ++k) add(k);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = sums + r * kPanel + v * kLanes;
      simd::store(to, first ? sum[r][v] : simd::load(to) + sum[r][v]);
    }
  }
}

template <int kRows = kTileRows>
void tile_of(int64_t rows, const float* x, const float* weights, int64_t depth, bool first, float* sums,
             const Fetched& fetched) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kRows - 1>(rows, x, weights, depth, first, sums, fetched);
  }
  tile<kRows>(x, weights, depth, first, sums, fetched);
}

struct Scratch {
  std::vector<float> packed, panel = std::vector<float>(kDepth * kPanel), sums;
};

// The first row of a tile, of `tiles` over `rows`
int64_t tile_start(int64_t rows, int64_t tiles, int64_t tile) { return rows * tile / tiles; }

// Outputs [begin, end) of rows [first, first + rows); x: tile after tile [inputs][rows of the tile]
template <class T>
void many_rows(const LinearArguments& arguments, const T* weights, Scratch& scratch, int64_t first, int64_t rows,
               int64_t tiles, int64_t begin, int64_t end) {
  const int64_t inputs = arguments.weight.columns;
  float *panel = scratch.panel.data(), *sums = scratch.sums.data();
  const float* x = scratch.packed.data();
  for (int64_t output = begin; output < end; output += kPanel) {
    const int64_t outputs = std::min(kPanel, end - output);
    for (int64_t start = 0; start < inputs; start += kDepth) {
      const int64_t depth = std::min(kDepth, inputs - start);
      const T* from = weights + output * inputs + start;
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        float* to = panel + j / kTileOutputs * kDepth * kTileOutputs + j % kTileOutputs;
        for (int64_t k = 0; k < depth; k += kLanes) {
          Vec square[kLanes];
          load_square(from + j * inputs + k, inputs, outputs - j, depth - k, square);
          const int64_t count = std::min(kLanes, depth - k);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kLanes; ++i) {
            if (i < count) simd::store(to + (k + i) * kTileOutputs, square[i]);
          }
        }
      }
      // meanwhile what is needed next: a row's next inputs, then the next panel
      const bool last = start + kDepth >= inputs;
      const uintptr_t next = reinterpret_cast<uintptr_t>(from) + (last ? kPanel * inputs - start : kDepth) * sizeof(T);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = tile_start(rows, tiles, t), count = tile_start(rows, tiles, t + 1) - row;
        const int64_t line = kPanel * t / tiles, lines = kPanel * (t + 1) / tiles - line, pitch = inputs * sizeof(T);
        const Fetched fetched{next + line * pitch, lines, pitch, sizeof(T)};
        for (int64_t j = 0; j < outputs; j += kTileOutputs) {
          tile_of(count, x + row * inputs + start * count, panel + j * kDepth, depth, start == 0,
                  sums + row * kPanel + j, j == 0 ? fetched : Fetched{});
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < outputs; j += kLanes) {
        finish(arguments, first + row, output + j, simd::load(sums + row * kPanel + j));
      }
    }
  }
}

// packed [width][count] of rows [count <= kLanes, width]; up to kLanes floats behind it are overwritten
void pack(const float* rows, int64_t count, int64_t width, float* packed) {
  for (int64_t k = 0; k < width; k += kLanes) {
    Vec square[kLanes];
    load_square(rows + k, width, count, width - k, square);
    for (int64_t i = 0; i < std::min(kLanes, width - k); ++i) simd::store(packed + (k + i) * count, square[i]);
  }
}

template <int kRows = kFew, class T>
void few_rows_of(int64_t rows, const LinearArguments& arguments, const T* weights, const float* x, int64_t first,
                 int64_t begin, int64_t end) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return few_rows_of<kRows - 1>(rows, arguments, weights, x, first, begin, end);
  }
  few_rows<kRows>(arguments, weights, x, first, begin, end);
}

}  // namespace

void linear(const LinearArguments& arguments, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const int64_t inputs = arguments.weight.columns;
  const int64_t first_output = begin * kPanel, last_output = std::min(end * kPanel, arguments.weight.rows);
  const int64_t fitting = kPackedBytes / 4 / inputs;
  const int64_t most = std::clamp(fitting, 2 * kTileRows, kMostRows);
  for (int64_t first = 0; first < arguments.rows; first += most) {
    const int64_t rows = std::min(most, arguments.rows - first);
    const bool few = rows <= kFew;
    const int64_t tiles = few ? 1 : (rows + kTileRows - 1) / kTileRows;
    const int64_t needed = rows * inputs + kLanes;
    if (static_cast<int64_t>(scratch.packed.size()) < needed) scratch.packed.resize(needed);
    if (static_cast<int64_t>(scratch.sums.size()) < kPanel * rows) scratch.sums.resize(kPanel * rows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = tile_start(rows, tiles, t), count = tile_start(rows, tiles, t + 1) - row;
      pack(arguments.in + (first + row) * inputs, count, inputs, scratch.packed.data() + row * inputs);
    }
    with_weights(arguments.weight, [&](auto* weights) {
      if (few) {
        few_rows_of(rows, arguments, weights, scratch.packed.data(), first, first_output, last_output);
      } else {
        many_rows(arguments, weights, scratch, first, rows, tiles, first_output, last_output);
      }
    });
  }
}

}  // namespace condgen_fast::transformer::CONDGEN_FAST_ISA
