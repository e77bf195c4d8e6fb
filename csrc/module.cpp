// The Python module fastres._C: what is not a tensor op. Importing it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/kept_chain.h"
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

// Objects of the list, this many before they are looked at: they lie apart, and a network's weights
// leave none of them in the caches.
constexpr Py_ssize_t kAhead = 16;

void prefetch_ahead(const pybind11::list& objects, Py_ssize_t i) {
  if (i + kAhead < PyList_GET_SIZE(objects.ptr())) {
    __builtin_prefetch(PyList_GET_ITEM(objects.ptr(), i + kAhead));
  }
}

bool same_values(const pybind11::list& dicts, const pybind11::list& values) {
  const Py_ssize_t count = PyList_GET_SIZE(values.ptr());
  Py_ssize_t seen = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts.ptr()); ++i) {
    prefetch_ahead(dicts, i);
    PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), i);
    PyObject* value = nullptr;
    for (Py_ssize_t place = 0; PyDict_Next(dict, &place, nullptr, &value) != 0; ++seen) {
      if (seen == count || PyList_GET_ITEM(values.ptr(), seen) != value) return false;
    }
  }
  return seen == count;
}

bool all_empty(const pybind11::list& dicts) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(dicts.ptr()); ++i) {
    prefetch_ahead(dicts, i);
    if (PyDict_Size(PyList_GET_ITEM(dicts.ptr(), i)) != 0) return false;
  }
  return true;
}

bool same_types(const pybind11::list& objects, const pybind11::list& types) {
  const Py_ssize_t count = PyList_GET_SIZE(types.ptr());
  if (PyList_GET_SIZE(objects.ptr()) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const type = PyList_GET_ITEM(types.ptr(), i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyList_GET_ITEM(objects.ptr(), i))) != type) {
      return false;
    }
  }
  return true;
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
  m.def("conv_chain_stays", &fastres::cpu::conv_chain_stays, pybind11::arg("chain"),
        "Whether the tensors that a chain of fastres::keep_conv_chain watches lie as they did.");
  m.def("drop_conv_chain", &fastres::cpu::drop_conv_chain, pybind11::arg("chain"),
        "Forget a chain of fastres::keep_conv_chain's.");
  m.def("same_values", &same_values, pybind11::arg("dicts"), pybind11::arg("values"),
        "Whether the values of the dicts, one dict after the other, are these very objects.");
  m.def("all_empty", &all_empty, pybind11::arg("dicts"), "Whether none of the dicts has an item.");
  m.def("same_types", &same_types, pybind11::arg("objects"), pybind11::arg("types"),
        "Whether the objects' types are these.");
  m.def("build_info", &build_info, "Compiler and torch version of this build.");
}
