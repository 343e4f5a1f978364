#include "common/cpu_capability.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace condgen_fast {

namespace {

#if defined(__x86_64__)
// Intel SDM vol. 2A, CPUID leaves 1, 7 and 0x80000001; vol. 1, 13.3: the operating system saves the registers whose
// bits XGETBV gives. The sets are those of the flags in CMakeLists.txt.
CpuCapability detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return CpuCapability::kBaseline;
  constexpr unsigned kFma = 1u << 12, kPopcnt = 1u << 23, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr unsigned kNeeded = kFma | kPopcnt | kOsxsave | kAvx | kF16c;
  if ((c & kNeeded) != kNeeded) return CpuCapability::kBaseline;

  unsigned saved = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned kYmm = 0x6, kZmm = 0xe6;
  if ((saved & kYmm) != kYmm) return CpuCapability::kBaseline;

  if (!__get_cpuid(0x80000001, &a, &b, &c, &d) || !(c & (1u << 5))) return CpuCapability::kBaseline;  // LZCNT
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return CpuCapability::kBaseline;
  constexpr unsigned kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8;
  if ((b & (kBmi1 | kAvx2 | kBmi2)) != (kBmi1 | kAvx2 | kBmi2)) return CpuCapability::kBaseline;

  constexpr unsigned kAvx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
  return (saved & kZmm) == kZmm && (b & kAvx512) == kAvx512 ? CpuCapability::kAvx512 : CpuCapability::kAvx2;
}
#else
CpuCapability detect() { return CpuCapability::kBaseline; }
#endif

CpuCapability choose() {
  const char* wanted = std::getenv("CONDGEN_FAST_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return detect();
  for (CpuCapability each : {CpuCapability::kBaseline, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
    if (std::string(wanted) == cpu_capability_name(each)) return std::min(each, detect());
  }
  throw std::invalid_argument(std::string("CONDGEN_FAST_CPU_CAPABILITY must be baseline, avx2 or avx512; got ") +
                              wanted);
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability chosen = choose();
  return chosen;
}

const char* cpu_capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx2:
      return "avx2";
    case CpuCapability::kAvx512:
      return "avx512";
    default:
      return "baseline";
  }
}

}  // namespace condgen_fast
