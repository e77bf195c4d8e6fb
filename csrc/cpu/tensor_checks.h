// What every CPU operator does before its loops: argument checks and the channels_last layout.
// Errors read `fastres::<op>: <argument> must be ..., got ...`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernel_table.h"
#include "memory.h"

namespace fastres::cpu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not STD_TORCH_CHECK: that puts this source file's path in front of the user's message.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "fastres::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i == 0 ? "" : ", ") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

inline std::string shape_string(const Tensor& t) { return shape_string(t.sizes()); }

inline std::string dtype_string(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(type);
  }
}

// Parameter dtype: that of per-channel vectors beside activations of this dtype.
inline ScalarType parameter_dtype(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The table index of the dtype of t.
inline DType check_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Double:
      return DType::float64;
    default:
      fail(op, name, " must be float32, bfloat16, float16 or float64, got ",
           dtype_string(t.scalar_type()));
  }
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  if (!t.is_cpu() || layout != aoti_torch_layout_strided()) {
    fail(op, name, " must be a dense tensor on the CPU, got one on another device or sparse");
  }
}

// (N, C, H, W) on the CPU, of a supported dtype.
inline DType check_images(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  if (t.dim() != 4) fail(op, name, " must be 4-dimensional, got shape ", shape_string(t));
  return check_dtype(op, name, t);
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t,
                             const char* other_name, const Tensor& other) {
  if (t.scalar_type() != other.scalar_type()) {
    fail(op, name, " must be ", dtype_string(other.scalar_type()), " as ", other_name, ", got ",
         dtype_string(t.scalar_type()));
  }
}

// Two integers, as of a stride.
inline std::array<int64_t, 2> check_pair(const char* op, const char* name,
                                         const std::vector<int64_t>& values, int64_t smallest) {
  constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  const bool valid = values.size() == 2 && std::min(values[0], values[1]) >= smallest &&
                     std::max(values[0], values[1]) <= largest;
  if (!valid) {
    fail(op, name, " must be two integers >= ", smallest, ", got ",
         shape_string({values.data(), values.size()}));
  }
  return {values[0], values[1]};
}

// Like `other` in device, shape and dtype.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* other_name,
                       const Tensor& other) {
  check_cpu(op, name, t);
  bool same = t.dim() == other.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == other.size(d);
  if (!same) {
    fail(op, name, " must be of shape ", shape_string(other), " as ", other_name, ", got ",
         shape_string(t));
  }
  check_same_dtype(op, name, t, other_name, other);
}

// A per-channel vector (channels,) beside activations of dtype `type`; returned contiguous.
inline Tensor check_channel_vector(const char* op, const char* name, const Tensor& t,
                                   int64_t channels, ScalarType type) {
  check_cpu(op, name, t);
  if (t.dim() != 1 || t.size(0) != channels) {
    fail(op, name, " must be of shape (", channels, ",), one value a channel, got ",
         shape_string(t));
  }
  if (t.scalar_type() != parameter_dtype(type)) {
    fail(op, name, " must be ", dtype_string(parameter_dtype(type)), " beside ", dtype_string(type),
         " images, got ", dtype_string(t.scalar_type()));
  }
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> check_channel_vector(const char* op, const char* name,
                                                  const std::optional<Tensor>& t, int64_t channels,
                                                  ScalarType type) {
  if (!t.has_value()) return std::nullopt;
  return check_channel_vector(op, name, *t, channels, type);
}

// True where (N, C, H, W) lies in memory as dense (N, H, W, C).
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// t itself where it is channels_last already, else a copy that is.
inline Tensor as_channels_last(const Tensor& t) {
  return is_channels_last(t) ? t : torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

inline Tensor empty_vector(int64_t size, ScalarType type) {
  return torch::stable::empty(std::array<int64_t, 1>{size}, type);
}

// Calls an aten operator through the dispatcher; Results are its result types in order.
template <typename... Results, typename... Args>
auto call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue,
             (sizeof...(Args) > sizeof...(Results) ? sizeof...(Args) : sizeof...(Results))>
      stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  if constexpr (sizeof...(Results) == 1) {
    return torch::stable::detail::to<Results...>(stack[0]);
  } else {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return std::tuple<Results...>{torch::stable::detail::to<Results>(stack[I])...};
    }(std::index_sequence_for<Results...>{});
  }
}

// `t` in float32: itself, or a copy.
inline Tensor as_floats(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

}  // namespace fastres::cpu
