// Which instruction set the CPU kernels run with, and how a family's kernel is called for it.
//
// <family>.h        declares them:   CONDGEN_FAST_CPU_DECLARE(void scale(const float* x, int64_t n, float* y);)
// <family>_cpu.cpp  defines them:    namespace condgen_fast::<family>::CONDGEN_FAST_ISA { void scale(...) {...} }
// <family>.cpp      calls the best:  CONDGEN_FAST_CPU_CALL(scale, x, n, y)
// the first and last inside namespace condgen_fast::<family>.
#pragma once

namespace condgen_fast {

enum class CpuCapability { kBaseline, kAvx2, kAvx512 };

// The best instruction set that this processor and its operating system have, or CONDGEN_FAST_CPU_CAPABILITY
// (baseline, avx2 or avx512; for tests) where that is lower. Read once. Throws std::invalid_argument for another word.
CpuCapability cpu_capability();

// "baseline", "avx2" or "avx512"
const char* cpu_capability_name(CpuCapability capability);

}  // namespace condgen_fast

#if defined(__x86_64__)
#define CONDGEN_FAST_CPU_DECLARE(...) \
  namespace baseline {                \
  __VA_ARGS__                         \
  }                                   \
  namespace avx2 {                    \
  __VA_ARGS__                         \
  }                                   \
  namespace avx512 {                  \
  __VA_ARGS__                         \
  }
#define CONDGEN_FAST_CPU_CALL(function, ...)                                                                  \
  (::condgen_fast::cpu_capability() == ::condgen_fast::CpuCapability::kAvx512 ? avx512::function(__VA_ARGS__) \
   : ::condgen_fast::cpu_capability() == ::condgen_fast::CpuCapability::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                                                              : baseline::function(__VA_ARGS__))
#else
#define CONDGEN_FAST_CPU_DECLARE(...) \
  namespace baseline {                \
  __VA_ARGS__                         \
  }
#define CONDGEN_FAST_CPU_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif
