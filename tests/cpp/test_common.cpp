#include "simd_tests.h"
#include "testing.h"

namespace condgen_fast::simd_tests {

TEST(simd_exponential) { CONDGEN_FAST_CPU_CALL(exponential); }
TEST(simd_arithmetic) { CONDGEN_FAST_CPU_CALL(arithmetic); }
TEST(simd_tails) { CONDGEN_FAST_CPU_CALL(tails); }
TEST(simd_conversions) { CONDGEN_FAST_CPU_CALL(conversions); }

}  // namespace condgen_fast::simd_tests
