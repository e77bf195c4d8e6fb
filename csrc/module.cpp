// The Python module fastres._C: what is not a tensor op. Importing it registers the ops.
//
// It keeps to CPython's limited API of 3.10, so that one binary serves every Python since.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/ops.h"
#include "cpu/winograd.h"

namespace {

// Python has been told of an error.
class PythonError {};

// A reference of ours to an object that Python made, or failed to make.
class Object {
 public:
  explicit Object(PyObject* made) : object_(made) {
    if (made == nullptr) throw PythonError();
  }
  ~Object() { Py_XDECREF(object_); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

template <typename T>
T from_python(PyObject* object);

template <>
bool from_python(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw PythonError();
  return truth != 0;
}

template <>
int64_t from_python(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw PythonError();
  return value;
}

template <>
size_t from_python(PyObject* object) {
  const size_t value = PyLong_AsSize_t(object);
  if (value == static_cast<size_t>(-1) && PyErr_Occurred() != nullptr) throw PythonError();
  return value;
}

template <>
std::string from_python(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw PythonError();
  return {text, static_cast<size_t>(size)};
}

template <>
std::vector<int64_t> from_python(PyObject* object) {
  const Py_ssize_t size = PySequence_Size(object);
  if (size < 0) throw PythonError();
  std::vector<int64_t> values;
  for (Py_ssize_t i = 0; i < size; ++i) {
    const Object item(PySequence_GetItem(object, i));
    values.push_back(from_python<int64_t>(item.get()));
  }
  return values;
}

PyObject* to_python(bool value) { return PyBool_FromLong(value); }
PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
PyObject* to_python(size_t value) { return PyLong_FromSize_t(value); }
PyObject* to_python(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}
PyObject* to_python(const std::vector<std::string>& values) {
  Object list(PyList_New(0));
  for (const std::string& value : values) {
    const Object item(to_python(value));
    if (PyList_Append(list.get(), item.get()) != 0) throw PythonError();
  }
  return list.release();
}
PyObject* to_python(const std::map<std::string, std::string>& values) {
  Object dict(PyDict_New());
  for (const auto& [key, value] : values) {
    const Object item(to_python(value));
    if (PyDict_SetItemString(dict.get(), key.c_str(), item.get()) != 0) throw PythonError();
  }
  return dict.release();
}

template <typename Result, typename... Arguments, size_t... i>
PyObject* call(Result (*function)(Arguments...), PyObject* given, std::index_sequence<i...>) {
  if (PyTuple_Size(given) != static_cast<Py_ssize_t>(sizeof...(Arguments))) {
    return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Arguments),
                        PyTuple_Size(given));
  }
  try {
    const std::tuple<std::decay_t<Arguments>...> arguments{
        from_python<std::decay_t<Arguments>>(PyTuple_GetItem(given, i))...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, arguments);
      return Py_BuildValue("");
    } else {
      return to_python(std::apply(function, arguments));
    }
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}

template <typename Result, typename... Arguments>
PyObject* call(Result (*function)(Arguments...), PyObject* given) {
  return call(function, given, std::index_sequence_for<Arguments...>());
}

// A function of the module, its arguments by position.
template <auto function>
constexpr PyMethodDef method(const char* name, const char* doc) {
  return {name, [](PyObject*, PyObject* given) { return call(function, given); }, METH_VARARGS,
          doc};
}

std::string cpu_capability() { return fastres::cpu::isa_name(fastres::cpu::current_isa()); }

std::map<std::string, std::string> build_info() {
  return {
      {"compiler",
#if defined(__clang__)
       "clang " __clang_version__
#else
       "gcc " __VERSION__
#endif
      },
      {"torch", FASTRES_BUILT_WITH_TORCH},
  };
}

PyMethodDef methods[] = {
    method<cpu_capability>("cpu_capability",
                           "The instruction set in use: baseline, avx2, avx512 or amx."),
    method<fastres::cpu::available_isas>(
        "available_cpu_capabilities",
        "The instruction sets that this machine can use, slowest first."),
    method<fastres::cpu::packed_conv_weight_numel>(
        "packed_conv_weight_numel",
        "Length of fastres::pack_conv_weight's result for a float32 weight of a shape."),
    method<fastres::cpu::winograd_allowed>(
        "winograd_allowed", "Whether Winograd's algorithm may compute a convolution."),
    method<fastres::cpu::set_winograd_allowed>("set_winograd_allowed",
                                               "Set that, for all threads."),
    method<fastres::cpu::conv_algorithm>(
        "conv_algorithm", "Name of the algorithm that would compute a convolution forward."),
    method<fastres::cpu::kept_memory_limit>(
        "kept_memory_limit",
        "Bytes of freed memory that the CPU kernels keep for their next results, at most."),
    method<fastres::cpu::set_kept_memory_limit>(
        "set_kept_memory_limit",
        "Set that limit, free what is above it, and return the limit before."),
    method<build_info>("build_info", "Compiler and torch version of this build."),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "fastres._C",
    "fastres: C++ kernels. Importing this module registers torch.ops.fastres.*",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
