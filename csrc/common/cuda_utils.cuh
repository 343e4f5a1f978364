// What CUDA launchers and kernels share: torch's current stream, the device guard, the launch check, reductions in a
// warp.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace condgen_fast {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// Makes the tensor's device the current one for a scope and gives torch's current stream on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Right after each <<<...>>>: wrong launch parameters are reported here, faults inside the kernel only later.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// The number of blocks of `size` that cover `count`
template <class Int>
__host__ __device__ constexpr Int ceil_div(Int count, Int size) {
  return (count + size - 1) / size;
}

// Reductions over all 32 lanes, the result in every lane. All lanes of the warp must call them.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_min(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, value, distance);
    value = other < value ? other : value;
  }
  return value;
}

}  // namespace condgen_fast
