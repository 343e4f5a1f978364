// Tests of the forward pass's kernels: values against plain loops in double, bits against other batches.
#include "transformer/transformer.h"

#include <algorithm>
#include <vector>

#include "testing.h"

namespace condgen_fast::transformer {
namespace {

std::vector<float> normal(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = testing::random_normal();
  return values;
}

int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

struct Product {
  int64_t rows, inputs, outputs;
};

}  // namespace

TEST(linear_is_the_product_in_any_split) {
  for (const Product& size : {Product{1, 1, 1},
                              {3, 5, 7},
                              {16, 16, 24},
                              {17, 300, 25},
                              {4, 300, 65},
                              {8, 290, 31},
                              {12, 40, 33},
                              {13, 300, 65},
                              {40, 257, 49},
                              {300, 33, 12},
                              {2, 2050, 30},
                              {70, 2048, 24}}) {
    const auto [rows, inputs, outputs] = size;
    const std::vector<float> in = normal(rows * inputs), weight = normal(outputs * inputs), bias = normal(outputs),
                             held = normal(rows * outputs);
    for (Activation activation : {Activation::kNone, Activation::kRelu, Activation::kGelu}) {
      const bool add = activation != Activation::kGelu;
      std::vector<float> out = held;
      LinearArguments arguments{
          in.data(), rows, {weight.data(), Real::kFloat, outputs, inputs}, bias.data(), activation, add, out.data()};
      const int64_t middle = testing::random_int(0, panels(outputs));
      CONDGEN_FAST_CPU_CALL(linear, arguments, middle, panels(outputs));
      CONDGEN_FAST_CPU_CALL(linear, arguments, 0, middle);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = 0; j < outputs; ++j) {
          double sum = bias[j], size_of_sum = 1;
          for (int64_t k = 0; k < inputs; ++k) {
            const double term = static_cast<double>(in[row * inputs + k]) * weight[j * inputs + k];
            sum += term;
            size_of_sum += std::abs(term);
          }
          if (activation == Activation::kRelu) sum = std::max(sum, 0.0);
          if (activation == Activation::kGelu) sum *= 0.5 * std::erfc(-sum / std::sqrt(2.0));
          if (add) sum += held[row * outputs + j];
          CHECK_NEAR(out[row * outputs + j], sum, 4e-7 * size_of_sum);
        }
      }
      // a row alone
      const int64_t row = testing::random_int(0, rows - 1);
      std::vector<float> alone(held.begin() + row * outputs, held.begin() + (row + 1) * outputs);
      arguments.in += row * inputs;
      arguments.rows = 1;
      arguments.out = alone.data();
      CONDGEN_FAST_CPU_CALL(linear, arguments, 0, panels(outputs));
      CHECK(std::equal(alone.begin(), alone.end(), out.begin() + row * outputs));
    }
  }
}

TEST(linear_passes_nan_on) {
  const std::vector<float> in{NAN, 1}, weight{1, 1};
  for (Activation activation : {Activation::kNone, Activation::kRelu, Activation::kGelu}) {
    std::vector<float> out(2);
    const LinearArguments arguments{in.data(), 2,         {weight.data(), Real::kFloat, 1, 1}, nullptr, activation,
                                    false,     out.data()};
    CONDGEN_FAST_CPU_CALL(linear, arguments, 0, 1);
    CHECK(std::isnan(out[0]) && !std::isnan(out[1]));
  }
}

TEST(attention_weighs_the_values_of_its_sentence) {
  for (const auto& [heads, width] : {std::pair<int64_t, int64_t>{1, 1}, {3, 8}, {2, 64}, {2, 84}}) {
    const int64_t rows = 5, whole = heads * width, total = 60;
    const std::vector<float> query = normal(rows * whole), keys = normal(total * whole), values = normal(total * whole);
    const std::vector<int64_t> sentence{1, 0, 1, 2, 2}, start{0, 20 * whole, 53 * whole}, count{20, 33, 1};
    std::vector<float> out(rows * whole);
    const SentenceAttention arguments{query.data(), whole, {heads, width, 0.3f}, keys.data(),  values.data(),
                                      whole,        width, sentence.data(),      start.data(), count.data(),
                                      out.data()};
    CONDGEN_FAST_CPU_CALL(attend, arguments, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t first = start[sentence[row]] + head * width, positions = count[sentence[row]];
        std::vector<double> weights(positions);
        double sum = 0;
        for (int64_t s = 0; s < positions; ++s) {
          double score = 0;
          for (int64_t d = 0; d < width; ++d) {
            score += static_cast<double>(query[row * whole + head * width + d]) * keys[first + s * whole + d];
          }
          sum += weights[s] = std::exp(0.3 * score);
        }
        for (int64_t d = 0; d < width; ++d) {
          double wanted = 0;
          for (int64_t s = 0; s < positions; ++s) wanted += weights[s] / sum * values[first + s * whole + d];
          CHECK_NEAR(out[row * whole + head * width + d], wanted, 2e-6);
        }
      }
    }
  }
}

TEST(cached_attention_reads_by_slots_and_writes_its_own) {
  const int64_t heads = 2, width = 6, rows = 3, layers = 2, layer = 1;
  // parts of 2 and 4 positions with 4 and 3 rows; this is position 4
  std::vector<float> first = normal(2 * layers * 2 * 4 * width), second = normal(4 * layers * 2 * 3 * width);
  const CachePart parts[] = {{first.data(), 2, 4}, {second.data(), 4, 3}};
  const std::vector<int32_t> slots{3, 0, 2, 1, 0, 0, 0, 0, 2, 3, 1, 2};
  const std::vector<float> input = normal(rows * 3 * width);
  std::vector<float> out(rows * width);
  const CacheAttention arguments{input.data(), {heads, width / heads, 1.0f}, parts, layers, layer, slots.data(), 4,
                                 out.data()};
  CONDGEN_FAST_CPU_CALL(attend_cached, arguments, 1, rows);
  CONDGEN_FAST_CPU_CALL(attend_cached, arguments, 0, 1);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<float> keys, values;
    for (int64_t s = 0; s < 5; ++s) {
      const CachePart& part = parts[s >= 2];
      const int64_t slot = s < 4 ? slots[row * 4 + s] : row, place = s < 2 ? s : s - 2;
      const float* key = part.data + ((place * layers + layer) * 2 * part.rows + slot) * width;
      keys.insert(keys.end(), key, key + width);
      values.insert(values.end(), key + part.rows * width, key + (part.rows + 1) * width);
    }
    CHECK(std::equal(keys.end() - width, keys.end(), input.data() + (row * 3 + 1) * width));
    CHECK(std::equal(values.end() - width, values.end(), input.data() + (row * 3 + 2) * width));
    const int64_t sentence = 0, start = 0, count = 5;
    std::vector<float> wanted(width);
    const SentenceAttention plain{input.data() + row * 3 * width,
                                  0,
                                  {heads, width / heads, 1.0f},
                                  keys.data(),
                                  values.data(),
                                  width,
                                  width / heads,
                                  &sentence,
                                  &start,
                                  &count,
                                  wanted.data()};
    CONDGEN_FAST_CPU_CALL(attend, plain, 0, 1);
    CHECK(std::equal(wanted.begin(), wanted.end(), out.begin() + row * width));
  }
}

TEST(norm_and_embedding) {
  for (int64_t width : {1, 7, 16, 50}) {
    const int64_t rows = 3;
    std::vector<float> in = normal(rows * width), weight = normal(width), bias = normal(width), out(rows * width);
    for (float& x : in) x += 100;
    CONDGEN_FAST_CPU_CALL(normalise, NormArguments{in.data(), width, weight.data(), bias.data(), 1e-5f, out.data()}, 0,
                          rows);
    for (int64_t row = 0; row < rows; ++row) {
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < width; ++i) mean += in[row * width + i] / static_cast<double>(width);
      for (int64_t i = 0; i < width; ++i)
        variance += std::pow(in[row * width + i] - mean, 2) / static_cast<double>(width);
      for (int64_t i = 0; i < width; ++i) {
        const double wanted = weight[i] * (in[row * width + i] - mean) / std::sqrt(variance + 1e-5) + bias[i];
        CHECK_NEAR(out[row * width + i], wanted, 1e-3);
      }
    }
    const std::vector<float> embedding = normal(4 * width), positions = normal(2 * width);
    const std::vector<int64_t> tokens{3, 0, 3}, places{1, 0, 0};
    CONDGEN_FAST_CPU_CALL(embed,
                          EmbedArguments{tokens.data(),
                                         places.data(),
                                         {embedding.data(), Real::kFloat, 4, width},
                                         {positions.data(), Real::kFloat, 2, width},
                                         1.5f,
                                         out.data()},
                          0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < width; ++i) {
        CHECK(out[row * width + i] == positions[places[row] * width + i] + 1.5f * embedding[tokens[row] * width + i]);
      }
    }
  }
}

}  // namespace condgen_fast::transformer
