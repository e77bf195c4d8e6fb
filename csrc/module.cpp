// The Python module fastres._C: what is not a tensor op. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = std::string(
#if defined(__clang__)
      "clang " __clang_version__
#else
      "gcc " __VERSION__
#endif
  );
  info["torch"] = std::string(FASTRES_BUILT_WITH_TORCH);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastres: C++ kernels. Importing this module registers torch.ops.fastres.*";
  m.def(
      "cpu_capability",
      [] { return std::string(fastres::cpu::isa_name(fastres::cpu::current_isa())); },
      "The instruction set in use: baseline, avx2 or avx512.");
  m.def("available_cpu_capabilities", &fastres::cpu::available_isas,
        "The instruction sets that this machine can use, slowest first.");
  m.def("build_info", &build_info, "Compiler and torch version of this build.");
}
