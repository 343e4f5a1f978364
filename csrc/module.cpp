// condgen_fast._C: what was built, and host-side classes. Knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "beam_search/trie.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const auto words = [](const char* text) { return py::str(text).attr("split")(); };
  py::dict info;
  info["version"] = CONDGEN_FAST_VERSION;
  info["compiler"] = CONDGEN_FAST_COMPILER;
  info["torch"] = CONDGEN_FAST_TORCH_VERSION;
  info["cpu_capabilities"] = words(CONDGEN_FAST_INSTRUCTION_SETS);
  info["cuda"] = py::none();
  if (*CONDGEN_FAST_CUDA_VERSION != '\0') info["cuda"] = CONDGEN_FAST_CUDA_VERSION;
  info["cuda_architectures"] = words(CONDGEN_FAST_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built, and host-side classes of condgen_fast.";
  m.def("build_info", &build_info,
        "What was built -> {version, compiler, torch (built against), cpu_capabilities, cuda (nvcc's version or None), "
        "cuda_architectures}.");

  using condgen_fast::beam_search::Trie;
  py::class_<Trie>(m, "Trie", "The tree of the common beginnings of token sequences; node 0 is the root.")
      .def(py::init<const std::vector<std::vector<int64_t>>&>(), py::arg("sequences"))
      .def_readonly("parents", &Trie::parents, "Node that each edge leaves; edge e leads to node e + 1.")
      .def_readonly("tokens", &Trie::tokens, "Token of each edge.")
      .def_readonly("finals", &Trie::finals, "Nodes that a sequence ends at, each once.");
}
