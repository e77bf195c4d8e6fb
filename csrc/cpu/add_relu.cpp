#include <algorithm>

#include "ops.h"
#include "team.h"
#include "tensor_checks.h"

namespace fastres::cpu {
namespace {

// Calls on_elements(begin, end) for blocks of a dense tensor's elements, which begin with a vector.
template <typename F>
void for_blocks(int64_t numel, const F& on_elements) {
  constexpr int64_t block = 16384;
  parallel_for(0, (numel + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    on_elements(begin * block, std::min(end * block, numel));
  });
}

}  // namespace

Tensor add_relu(const Tensor& input, const Tensor& residual) {
  const char* op = "add_relu";
  const DType dtype = check_images(op, "input", input);
  check_like(op, "residual", residual, "input", input);
  const Tensor a = as_channels_last(input);
  const Tensor b = as_channels_last(residual);
  Tensor y = empty_channels_last(a.sizes(), a.scalar_type());
  const auto kernel = kernels().add_relu[static_cast<int>(dtype)];
  const void* a_data = a.const_data_ptr();
  const void* b_data = b.const_data_ptr();
  void* y_data = y.mutable_data_ptr();
  const bool stream = streams(y);
  for_blocks(y.numel(), [&](int64_t begin, int64_t end) {
    kernel(a_data, b_data, y_data, stream, begin, end);
  });
  return y;
}

Tensor add_relu_backward(const Tensor& dy, const Tensor& y) {
  const char* op = "add_relu_backward";
  const DType dtype = check_images(op, "dy", dy);
  check_like(op, "y", y, "dy", dy);
  const Tensor g = as_channels_last(dy);
  const Tensor out = as_channels_last(y);
  Tensor dinput = empty_channels_last(g.sizes(), g.scalar_type());
  const auto kernel = kernels().add_relu_backward[static_cast<int>(dtype)];
  const void* g_data = g.const_data_ptr();
  const void* out_data = out.const_data_ptr();
  void* dinput_data = dinput.mutable_data_ptr();
  const bool stream = streams(dinput);
  for_blocks(dinput.numel(), [&](int64_t begin, int64_t end) {
    kernel(g_data, out_data, dinput_data, stream, begin, end);
  });
  return dinput;
}

}  // namespace fastres::cpu
