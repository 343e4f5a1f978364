// A test is TEST(name) { CHECK(...); }; main.cpp runs all. Kernels are called through CONDGEN_FAST_CPU_CALL inside
// namespace condgen_fast::<family>.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace testing {

struct Test {
  std::string name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream message;
  message << file << ":" << line << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The same numbers in every run
inline std::mt19937_64& random_source() {
  static std::mt19937_64 source(20240501);
  return source;
}

inline int64_t random_int(int64_t low, int64_t high) {  // both included
  return std::uniform_int_distribution<int64_t>(low, high)(random_source());
}

inline float random_normal() { return std::normal_distribution<float>()(random_source()); }

}  // namespace testing

#define TEST(name)                                                         \
  static void test_##name();                                               \
  static const testing::Registration register_##name(#name, &test_##name); \
  static void test_##name()

#define CHECK(...)                                                                    \
  do {                                                                                \
    if (!(__VA_ARGS__)) testing::fail(__FILE__, __LINE__, "not true: " #__VA_ARGS__); \
  } while (false)

// |got - wanted| <= tolerance; infinities equal; NaN equal to NaN only
#define CHECK_NEAR(got, wanted, tolerance)                                                     \
  do {                                                                                         \
    const double got_ = (got), wanted_ = (wanted);                                             \
    const bool same_ = got_ == wanted_ || (std::isnan(got_) && std::isnan(wanted_));           \
    if (!same_ && !(std::abs(got_ - wanted_) <= (tolerance)))                                  \
      testing::fail(__FILE__, __LINE__, #got, " = ", got_, ", not ", #wanted, " = ", wanted_); \
  } while (false)
