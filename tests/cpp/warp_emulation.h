// Runs a CUDA kernel of one-warp blocks on the CPU: every lane is a coroutine that pauses at each warp-wide function
// until all lanes have come there. Slow and exact; finds wrong logic, not races between lanes.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __launch_bounds__(threads)

namespace warp_emulation {

constexpr int kLanes = 32;
constexpr int64_t kStackBytes = 128 * 1024;

struct Index {
  unsigned x;
};

struct Warp {
  ucontext_t caller;
  ucontext_t lanes[kLanes];
  bool finished[kLanes];
  int parity[kLanes];  // lanes in front may already be at the next meeting: two sets of values in turn
  unsigned long long values[2][kLanes];
  int lane;
  std::function<void()> kernel;
};

inline Warp warp;
inline Index block;

inline void pause() {
  const int lane = warp.lane;
  swapcontext(&warp.lanes[lane], &warp.caller);
  warp.lane = lane;
}

inline void run_lane() {
  warp.kernel();
  warp.finished[warp.lane] = true;
  pause();
}

// What all lanes brought to this meeting.
inline const unsigned long long* meet(unsigned long long value) {
  const int parity = warp.parity[warp.lane];
  warp.parity[warp.lane] ^= 1;
  warp.values[parity][warp.lane] = value;
  pause();
  return warp.values[parity];
}

inline void launch(int64_t blocks, std::function<void()> kernel) {
  static std::vector<char> stacks(kLanes * kStackBytes);
  warp.kernel = std::move(kernel);
  for (int64_t b = 0; b < blocks; ++b) {
    block.x = static_cast<unsigned>(b);
    for (int lane = 0; lane < kLanes; ++lane) {
      getcontext(&warp.lanes[lane]);
      warp.lanes[lane].uc_stack.ss_sp = stacks.data() + lane * kStackBytes;
      warp.lanes[lane].uc_stack.ss_size = kStackBytes;
      warp.lanes[lane].uc_link = nullptr;
      makecontext(&warp.lanes[lane], run_lane, 0);
      warp.finished[lane] = false;
      warp.parity[lane] = 0;
    }
    for (bool running = true; running;) {
      running = false;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (warp.finished[lane]) continue;
        warp.lane = lane;
        swapcontext(&warp.caller, &warp.lanes[lane]);
        running = true;
      }
    }
  }
}

}  // namespace warp_emulation

#define blockIdx warp_emulation::block
#define threadIdx (warp_emulation::Index{static_cast<unsigned>(warp_emulation::warp.lane)})

inline unsigned __ballot_sync(unsigned, bool value) {
  const auto* values = warp_emulation::meet(value);
  unsigned mask = 0;
  for (int lane = 0; lane < warp_emulation::kLanes; ++lane) mask |= static_cast<unsigned>(values[lane]) << lane;
  return mask;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return static_cast<T>(warp_emulation::meet(static_cast<unsigned long long>(value))[lane]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = warp_emulation::warp.lane;
  const auto* values = warp_emulation::meet(static_cast<unsigned long long>(value));
  return static_cast<T>(values[lane >= distance ? lane - distance : lane]);
}
inline int __reduce_add_sync(unsigned, int value) {
  const auto* values = warp_emulation::meet(static_cast<unsigned long long>(value));
  int sum = 0;
  for (int lane = 0; lane < warp_emulation::kLanes; ++lane) sum += static_cast<int>(values[lane]);
  return sum;
}
inline unsigned long long atomicAdd(unsigned long long* value, unsigned long long by) {
  *value += by;
  return *value - by;
}
inline void __syncwarp() { warp_emulation::meet(0); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }
