#include <algorithm>

#include "channel_rows.h"
#include "conv_shape.h"
#include "ops.h"
#include "tensor_checks.h"

namespace fastres::cpu {
namespace {

// Calls work(begin, end) for [0, count), each thread with this many elements to read at least.
template <typename F>
void in_parallel(int64_t count, int64_t elements_of_each, const F& work) {
  constexpr int64_t fewest = 4 * kGrainElements;
  const int64_t grain = std::max<int64_t>(1, fewest / std::max<int64_t>(1, elements_of_each));
  torch::stable::parallel_for(0, count, grain, work);
}

}  // namespace

Tensor avg_pool_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const char* op = "avg_pool_linear";
  const DType dtype = check_images(op, "input", input);
  const int64_t channels = input.size(1);
  check_cpu(op, "weight", weight);
  if (weight.dim() != 2 || weight.size(1) != channels) {
    fail(op, "weight must be of shape (outputs, ", channels,
         "), one value a channel of input in each row, got ", shape_string(weight));
  }
  check_same_dtype(op, "weight", weight, "input", input);
  const int64_t outputs = weight.size(0);
  if (bias.has_value()) {
    check_cpu(op, "bias", *bias);
    if (bias->dim() != 1 || bias->size(0) != outputs) {
      fail(op, "bias must be of shape (", outputs, ",), one value a row of weight, got ",
           shape_string(*bias));
    }
    check_same_dtype(op, "bias", *bias, "input", input);
  }

  const int64_t images = input.size(0);
  Tensor y = torch::stable::empty(std::array<int64_t, 2>{images, outputs}, input.scalar_type());
  if (y.numel() == 0) return y;
  const auto contiguous = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  const Tensor pixels = as_channels_last(input);
  const Tensor rows = contiguous(weight);
  const OptionalTensor shift = bias.has_value() ? OptionalTensor(contiguous(*bias)) : std::nullopt;

  const int64_t scalar_bytes = dtype == DType::float64 ? 8 : 4;
  const int64_t lanes = kernels().vector_bytes / scalar_bytes;
  const int64_t pitch = ceil_div(channels, lanes) * lanes;
  const Scratch means = scratch_floats(images * pitch * (scalar_bytes / 4));
  const AvgPoolLinearArgs args{
      .input = pixels.const_data_ptr(),
      .means = means.floats(),
      .weight = rows.const_data_ptr(),
      .bias = shift.has_value() ? shift->const_data_ptr() : nullptr,
      .output = y.mutable_data_ptr(),
      .images = images,
      .pixels = input.size(2) * input.size(3),
      .channels = channels,
      .outputs = outputs,
      .pitch = pitch,
  };
  const auto avg_pool = kernels().avg_pool[static_cast<int>(dtype)];
  const auto linear = kernels().linear[static_cast<int>(dtype)];
  in_parallel(images * ceil_div(channels, kAvgPoolChannels),
              args.pixels * std::min(channels, kAvgPoolChannels),
              [&](int64_t begin, int64_t end) { avg_pool(args, begin, end); });
  in_parallel(ceil_div(outputs, kLinearRows) * ceil_div(images, kLinearImages),
              kLinearRows * channels,
              [&](int64_t begin, int64_t end) { linear(args, begin, end); });
  return y;
}

}  // namespace fastres::cpu
