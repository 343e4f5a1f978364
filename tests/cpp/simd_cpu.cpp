// Tests of common/simd.h, compiled once for each instruction set.
#include "common/simd.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "simd_tests.h"
#include "testing.h"

namespace condgen_fast::simd_tests::CONDGEN_FAST_ISA {

using simd::BFloat16;
using simd::Half;
using simd::kLanes;
using simd::Vec;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Vec ramp(float start) {
  Vec lanes;
  for (int64_t i = 0; i < kLanes; ++i) lanes.raw[i] = start + static_cast<float>(i);
  return lanes;
}

template <class T>
void round_trip(float x, float wanted) {
  T memory[kLanes + 1] = {};
  simd::store(memory, Vec(x));
  CHECK_NEAR(simd::load(memory)[kLanes - 1], wanted, 0);
  CHECK_NEAR(simd::to_float(memory[0]), wanted, 0);
  CHECK_NEAR(simd::to_float(simd::from_float<T>(x)), wanted, 0);
  CHECK(simd::to_float(memory[kLanes]) == 0.0f);
}

}  // namespace

void exponential() {
#if defined(__AVX512F__)
  const double lowest = 0x1p-149, highest = 0x1p128;
#else
  const double lowest = 0x1p-126, highest = 0x1p127 * std::sqrt(2.0);  // 0 and infinity are legal beyond these
#endif
  float worst = 0.0f;
  auto check = [&](float x, float got, double exact) {
    const float rounded = static_cast<float>(exact);
    if (x != x) {
      CHECK(got != got);
    } else if (exact < lowest) {
      CHECK(got == 0.0f || std::abs(got - exact) <= 0x1p-149);
    } else if (exact >= highest) {
      CHECK(got == kInfinity || std::abs(got / exact - 1) < 1e-7);
    } else {
      const float ulp = std::nextafter(rounded, kInfinity) - rounded;
      worst = std::max(worst, static_cast<float>(std::abs(got - exact) / ulp));
    }
  };
  for (uint32_t bits = 0; bits < 0xfff00000u; bits += 4099) {
    const float x = std::bit_cast<float>(bits);
    check(x, simd::exp(Vec(x))[kLanes / 2], std::exp(static_cast<double>(x)));
    check(x, simd::exp2(Vec(x))[kLanes / 2], std::exp2(static_cast<double>(x)));
  }
  CHECK(worst <= (kLanes > 4 ? 1.0f : 1.2f));
  for (float x = -126.0f; x < 127.0f; x += 0.0144f) {
    CHECK(std::abs(simd::short_exp2(Vec(x))[kLanes / 2] / std::exp2(static_cast<double>(x)) - 1) < 1.6e-7);
    CHECK(simd::short_exp2(Vec(std::floor(x)))[0] == std::exp2(std::floor(x)));
  }
  CHECK(simd::short_exp2(Vec(NAN))[0] != simd::short_exp2(Vec(NAN))[0]);
  for (Vec (*power)(Vec) : {simd::exp, simd::exp2, simd::short_exp2}) {
    CHECK(power(Vec(0.0f))[0] == 1.0f);
    CHECK(power(Vec(-kInfinity))[0] == 0.0f);
    CHECK(power(Vec(kInfinity))[0] == kInfinity);
    CHECK(power(Vec(-3e38f))[0] == 0.0f);
    CHECK(power(Vec(3e38f))[0] == kInfinity);
  }
}

void arithmetic() {
  const Vec a = ramp(1.0f), b = ramp(-3.0f);
  for (int64_t i = 0; i < kLanes; ++i) {
    const float x = 1.0f + static_cast<float>(i), y = -3.0f + static_cast<float>(i);
    CHECK((a + b)[i] == x + y && (a - b)[i] == x - y && (a * b)[i] == x * y && (b / a)[i] == y / x);
    CHECK(simd::fma(a, b, a)[i] == x * y + x);
    CHECK(simd::max(a, Vec(2.0f))[i] == std::max(x, 2.0f) && simd::min(a, Vec(2.0f))[i] == std::min(x, 2.0f));
    CHECK(simd::select(b < Vec(0.0f), a, b)[i] == (y < 0.0f ? x : y));
    CHECK((simd::bits(b >= Vec(0.0f)) >> i & 1u) == (y >= 0.0f));
  }
  CHECK(simd::bits(a > Vec(0.0f)) == (1ull << kLanes) - 1);
  CHECK(!simd::any(a < Vec(0.0f)) && simd::any(a == Vec(1.0f)));
  CHECK(simd::max(Vec(NAN), a)[0] == 1.0f);
  CHECK(simd::reduce_sum(a) == static_cast<float>(kLanes * (kLanes + 1) / 2));
  CHECK(simd::reduce_max(b) == static_cast<float>(kLanes - 4));
  CHECK(simd::reduce_max(Vec(-kInfinity)) == -kInfinity);
}

void tails() {
  for (int64_t count = 0; count <= kLanes; ++count) {
    std::vector<float> memory(count), out(count, -1.0f);  // the sanitizer sees a step beyond
    std::vector<Half> halves(count);
    for (int64_t i = 0; i < count; ++i) memory[i] = static_cast<float>(i + 1);
    const Vec lanes = simd::load_first(memory.data(), count, -kInfinity);
    simd::store_first(out.data(), lanes, count);
    simd::store_first(halves.data(), lanes, count);
    const Vec back = simd::load_first(halves.data(), count, 7.0f);
    for (int64_t i = 0; i < kLanes; ++i) {
      CHECK(lanes[i] == (i < count ? static_cast<float>(i + 1) : -kInfinity));
      CHECK(back[i] == (i < count ? static_cast<float>(i + 1) : 7.0f));
    }
    CHECK(out == memory);
  }
}

void conversions() {
  for (float sign : {1.0f, -1.0f}) {
    for (float x : {0.0f, 1.0f, 0.5f, 0x1.8p-14f, 0x1p-24f, 65504.0f, kInfinity}) round_trip<Half>(sign * x, sign * x);
    for (float x : {0.0f, 1.0f, 0x1p-130f, 0x1.fep127f, kInfinity}) round_trip<BFloat16>(sign * x, sign * x);
    round_trip<Half>(sign * 65519.0f, sign * 65504.0f);
    round_trip<Half>(sign * 65520.0f, sign * kInfinity);
    round_trip<Half>(sign * 0x1p-25f, sign * 0.0f);  // ties to even, twice
    round_trip<Half>(sign * 0x1.8p-24f, sign * 0x1p-23f);
    round_trip<Half>(sign * (1.0f + 0x1p-11f), sign * 1.0f);
    round_trip<Half>(sign * (1.0f + 0x1.8p-10f), sign * (1.0f + 0x1p-9f));
    round_trip<BFloat16>(sign * (1.0f + 0x1p-8f), sign * 1.0f);
    round_trip<BFloat16>(sign * (1.0f + 0x1.8p-7f), sign * (1.0f + 0x1p-6f));
    round_trip<BFloat16>(sign * 0x1.ffp127f, sign * kInfinity);
  }
  round_trip<Half>(NAN, NAN);
  round_trip<BFloat16>(NAN, NAN);
  round_trip<BFloat16>(std::bit_cast<float>(0x7fffffffu), NAN);
}

}  // namespace condgen_fast::simd_tests::CONDGEN_FAST_ISA
