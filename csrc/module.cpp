// The Python module fastres._C: what is not a tensor op. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/winograd.h"

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
      "The instruction set in use: baseline, avx2, avx512 or amx.");
  m.def("available_cpu_capabilities", &fastres::cpu::available_isas,
        "The instruction sets that this machine can use, slowest first.");
  m.def("packed_conv_weight_numel", &fastres::cpu::packed_conv_weight_numel,
        "Length of fastres::pack_conv_weight's result for a weight of a shape and a dtype.",
        pybind11::arg("weight"), pybind11::arg("stride"), pybind11::arg("padding"),
        pybind11::arg("dilation"), pybind11::arg("groups"), pybind11::arg("input_size"),
        pybind11::arg("dtype"));
  m.def("winograd_allowed", &fastres::cpu::winograd_allowed,
        "Whether Winograd's algorithm may compute a convolution.");
  m.def("set_winograd_allowed", &fastres::cpu::set_winograd_allowed, pybind11::arg("allowed"),
        "Set that, for all threads.");
  m.def("conv_algorithm", &fastres::cpu::conv_algorithm,
        "Name of the algorithm that would compute a convolution forward.",
        pybind11::arg("input_size"), pybind11::arg("weight_size"), pybind11::arg("stride"),
        pybind11::arg("padding"), pybind11::arg("dilation"), pybind11::arg("groups"),
        pybind11::arg("dtype"), pybind11::arg("training"));
  m.def("kept_memory_limit", &fastres::cpu::kept_memory_limit,
        "Bytes of freed memory that the CPU kernels keep for their next results, at most.");
  m.def("set_kept_memory_limit", &fastres::cpu::set_kept_memory_limit, pybind11::arg("bytes"),
        "Set that limit, free what is above it, and return the limit before.");
  m.def("build_info", &build_info, "Compiler and torch version of this build.");
}
