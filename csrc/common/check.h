// Checks where tensors enter the ops. The Python functions have checked already, with the messages users see; these
// keep direct calls of torch.ops.condgen_fast.* from reading foreign memory. std::invalid_argument becomes ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace condgen_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define CONDGEN_FAST_CHECK(condition, ...)               \
  do {                                                   \
    if (!(condition)) ::condgen_fast::fail(__VA_ARGS__); \
  } while (false)

// sizes: -1 allows any
inline void check_shape(const Tensor& value, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = value.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) {
    fits = fits && (size == -1 || value.size(d) == size);
    ++d;
  }
  if (fits) return;
  std::ostringstream wanted, got;
  for (int64_t size : sizes) wanted << (wanted.tellp() > 0 ? ", " : "") << (size == -1 ? "*" : std::to_string(size));
  for (d = 0; d < value.dim(); ++d) got << (d > 0 ? ", " : "") << value.size(d);
  fail(name, " must have shape [", wanted.str(), "]; got [", got.str(), "]");
}

inline void check_dtype(const Tensor& value, const char* name, std::initializer_list<ScalarType> allowed) {
  for (ScalarType dtype : allowed) {
    if (value.scalar_type() == dtype) return;
  }
  std::ostringstream wanted;
  for (ScalarType dtype : allowed) wanted << (wanted.tellp() > 0 ? " or " : "") << torch::headeronly::toString(dtype);
  fail(name, " must be ", wanted.str(), "; got ", torch::headeronly::toString(value.scalar_type()));
}

inline void check_same_device(const Tensor& value, const char* name, const Tensor& other, const char* other_name) {
  CONDGEN_FAST_CHECK(value.is_cuda() == other.is_cuda() && value.get_device_index() == other.get_device_index(), name,
                     " must be on the device of ", other_name);
}

}  // namespace condgen_fast
