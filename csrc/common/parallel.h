// Threads over rows, sentences or whatever is independent: torch's own pool, so torch.set_num_threads() holds and pools
// do not compete. Ops called through torch.ops run without the GIL.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

namespace condgen_fast {

// Work worth starting another thread for, in units of one simple operation on one element.
constexpr int64_t kWorkPerThread = 32768;

// Calls body(begin, end) on ranges that together cover [0, count), at once on several threads where that pays;
// work_per_item is about how many simple operations an item takes. The first exception of a body is thrown again here.
template <class Body>
void parallel_for(int64_t count, int64_t work_per_item, const Body& body) {
  if (count <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_item));
  if (count <= grain) {
    body(0, count);
    return;
  }
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// How many ranges parallel_for makes at most: the number of scratch buffers to allocate, indexed by thread_index().
inline int64_t thread_count() { return torch::stable::get_num_threads(); }

inline int64_t thread_index() {
  uint32_t index = 0;
  torch_get_thread_idx(&index);
  return index;
}

}  // namespace condgen_fast
