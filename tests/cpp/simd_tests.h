#pragma once

#include "common/cpu_capability.h"

namespace condgen_fast::simd_tests {
CONDGEN_FAST_CPU_DECLARE(void exponential(); void arithmetic(); void tails(); void conversions();)
}
