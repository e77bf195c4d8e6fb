#include "avg_pool_linear.h"

#include <algorithm>

#include "channel_rows.h"
#include "conv_shape.h"
#include "memory.h"
#include "team.h"
#include "tensor_checks.h"

namespace fastres::cpu {
namespace {

// Calls work(begin, end) for [0, count), each thread with this many elements to read at least.
template <typename F>
void in_parallel(int64_t count, int64_t elements_of_each, const F& work) {
  constexpr int64_t fewest = 4 * kGrainElements;
  const int64_t grain = std::max<int64_t>(1, fewest / std::max<int64_t>(1, elements_of_each));
  parallel_for(0, count, grain, work);
}

Tensor dense_of(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor checked_weight(const AvgPoolLinear::Names& names, const Tensor& input, int64_t channels,
                      const Tensor& weight) {
  check_cpu(names.op, names.weight, weight);
  if (weight.dim() != 2 || weight.size(1) != channels) {
    fail(names.op, names.weight, " must be of shape (outputs, ", channels,
         "), one value a channel of input in each row, got ", shape_string(weight));
  }
  check_same_dtype(names.op, names.weight, weight, "input", input);
  return dense_of(weight);
}

}  // namespace

AvgPoolLinear::AvgPoolLinear(const Names& names, const Tensor& input, int64_t channels,
                             const Tensor& weight, const OptionalTensor& bias)
    : dtype_(check_dtype(names.op, "input", input)),
      type_(input.scalar_type()),
      channels_(channels),
      weight_(checked_weight(names, input, channels, weight)) {
  outputs_ = weight_.size(0);
  if (!bias.has_value()) return;
  check_cpu(names.op, names.bias, *bias);
  if (bias->dim() != 1 || bias->size(0) != outputs_) {
    fail(names.op, names.bias, " must be of shape (", outputs_, ",), one value a row of ",
         names.weight, ", got ", shape_string(*bias));
  }
  check_same_dtype(names.op, names.bias, *bias, "input", input);
  bias_ = dense_of(*bias);
}

Tensor AvgPoolLinear::empty(int64_t images) const {
  return torch::stable::empty(std::array<int64_t, 2>{images, outputs_}, type_);
}

void AvgPoolLinear::run(const void* input, int64_t images, int64_t pixels, void* output) const {
  if (images == 0 || outputs_ == 0) return;
  const int64_t scalar_bytes = dtype_ == DType::float64 ? 8 : 4;
  const int64_t lanes = kernels().vector_bytes / scalar_bytes;
  const int64_t pitch = ceil_div(channels_, lanes) * lanes;
  const Scratch means = scratch_floats(images * pitch * (scalar_bytes / 4));
  const AvgPoolLinearArgs args{
      .input = input,
      .means = means.floats(),
      .weight = weight_.const_data_ptr(),
      .bias = bias_.has_value() ? bias_->const_data_ptr() : nullptr,
      .output = output,
      .images = images,
      .pixels = pixels,
      .channels = channels_,
      .outputs = outputs_,
      .pitch = pitch,
  };
  const auto avg_pool = kernels().avg_pool[static_cast<int>(dtype_)];
  const auto linear = kernels().linear[static_cast<int>(dtype_)];
  in_parallel(images * ceil_div(channels_, kAvgPoolChannels),
              pixels * std::min(channels_, kAvgPoolChannels),
              [&](int64_t begin, int64_t end) { avg_pool(args, begin, end); });
  in_parallel(ceil_div(outputs_, kLinearRows) * ceil_div(images, kLinearImages),
              kLinearRows * channels_,
              [&](int64_t begin, int64_t end) { linear(args, begin, end); });
}

Tensor avg_pool_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const AvgPoolLinear::Names names = {"avg_pool_linear", "weight", "bias"};
  check_images(names.op, "input", input);
  const AvgPoolLinear head(names, input, input.size(1), weight, bias);
  Tensor y = head.empty(input.size(0));
  if (y.numel() == 0) return y;
  const Tensor pixels = as_channels_last(input);
  head.run(pixels.const_data_ptr(), input.size(0), input.size(2) * input.size(3),
           y.mutable_data_ptr());
  return y;
}

}  // namespace fastres::cpu
