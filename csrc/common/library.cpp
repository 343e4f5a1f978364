// The library condgen_fast; each family adds its ops in a STABLE_TORCH_LIBRARY_FRAGMENT of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/cpu_capability.h"

namespace {

std::string cpu_capability() { return condgen_fast::cpu_capability_name(condgen_fast::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(condgen_fast, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(condgen_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
