// What an op is given of a model: its tensors one after the other, checked as they are taken.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/check.h"
#include "transformer.h"

namespace condgen_fast::transformer {

struct Linear {
  Matrix weight;
  const float* bias;
};

struct Norm {
  const float *weight, *bias;
};

// In the order of ops/transformer/op.py
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

}  // namespace condgen_fast::transformer
