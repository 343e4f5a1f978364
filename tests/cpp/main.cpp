// Runs all tests, or those whose names contain the first argument, with the best instruction set of this processor or
// that of CONDGEN_FAST_CPU_CAPABILITY.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "common/cpu_capability.h"
#include "testing.h"

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  const char* capability = condgen_fast::cpu_capability_name(condgen_fast::cpu_capability());
  int passed = 0, failed = 0;
  for (const testing::Test& test : testing::tests()) {
    if (test.name.find(wanted) == std::string::npos) continue;
    try {
      test.body();
      ++passed;
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s (%s): %s\n", test.name.c_str(), capability, error.what());
    }
  }
  std::printf("C++ tests, %s: %d passed, %d failed\n", capability, passed, failed);
  return failed > 0 || passed == 0;
}
