#include "max_pool2d.h"

#include <algorithm>

#include "channel_rows.h"
#include "conv_shape.h"
#include "ops.h"
#include "team.h"
#include "tensor_checks.h"

namespace fastres::cpu {

PoolGeometry check_pool(const char* op, const std::array<int64_t, 4>& input,
                        const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding) {
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  std::array<int64_t, 2> size;
  for (int i = 0; i < 2; ++i) {
    // More, and a window could be without a pixel.
    if (padding[i] > kernel_size[i] / 2) {
      fail(op, "padding must be at most half of kernel_size ", shape_string(kernel_size), ", got ",
           shape_string(padding));
    }
    const int64_t free = input[2 + i] + 2 * padding[i] - kernel_size[i];
    if (input[2 + i] == 0 || free < 0) {
      fail(op, "input must be at least one pixel and with its padding at least kernel_size ",
           shape_string(kernel_size), " high and wide, got shape ",
           shape_string({input.data(), input.size()}));
    }
    size[i] = free / stride[i] + 1;
  }
  return {
      .n = input[0],
      .ih = input[2],
      .iw = input[3],
      .c = input[1],
      .oh = size[0],
      .ow = size[1],
      .kh = kernel_size[0],
      .kw = kernel_size[1],
      .stride_h = stride[0],
      .stride_w = stride[1],
      .pad_h = padding[0],
      .pad_w = padding[1],
  };
}

namespace {

PoolGeometry check_pool_of(const char* op, const Tensor& input,
                           const std::vector<int64_t>& kernel_size,
                           const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding) {
  check_images(op, "input", input);
  return check_pool(op, {input.size(0), input.size(1), input.size(2), input.size(3)}, kernel_size,
                    stride, padding);
}

// What a prologue's BatchNorm gives to the kernels; null pointers without one.
struct PrologueVectors {
  TiledVector mean, scale, bias;

  PrologueVectors(const std::optional<BatchNorm>& bn, const ChannelRows& rows) {
    if (!bn.has_value()) return;
    mean = TiledVector(rows, bn->mean);
    scale = TiledVector(rows, bn->scale);
    bias = TiledVector(rows, bn->bias);
  }
};

void run_pool(const MaxPoolArgs& args, DType dtype, bool prologue) {
  const PoolGeometry& g = args.geometry;
  const auto kernel = kernels().max_pool2d[static_cast<int>(dtype)][prologue];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (g.kh * g.ow * g.c));
  parallel_for(0, g.n * g.oh, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

Tensor max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const OptionalTensor& in_mean, const OptionalTensor& in_var,
                  const OptionalTensor& in_weight, const OptionalTensor& in_bias, double in_eps) {
  const char* op = "max_pool2d";
  const PoolGeometry g = check_pool_of(op, input, kernel_size, stride, padding);
  const DType dtype = check_dtype(op, "input", input);
  const auto bn = check_prologue(op, input, in_mean, in_var, in_weight, in_bias, in_eps);
  const std::array<int64_t, 4> output = {g.n, g.c, g.oh, g.ow};
  Tensor y = empty_channels_last(output, input.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor pixels = as_channels_last(input);
  const PrologueVectors prologue(bn, ChannelRows(pixels, dtype));
  const MaxPoolArgs args{
      .geometry = g,
      .input = pixels.const_data_ptr(),
      .output = y.mutable_data_ptr(),
      .mean = prologue.mean.data(),
      .scale = prologue.scale.data(),
      .bias = prologue.bias.data(),
      .stream = streams(y),
  };
  run_pool(args, dtype, bn.has_value());
  return y;
}

void max_pool2d_of(const PoolGeometry& g, DType dtype, const void* input, void* output,
                   bool stream) {
  MaxPoolArgs args{};
  args.geometry = g;
  args.input = input;
  args.output = output;
  args.stream = stream;
  run_pool(args, dtype, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> max_pool2d_backward(
    const Tensor& dy, const Tensor& input, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const OptionalTensor& in_mean, const OptionalTensor& in_var, const OptionalTensor& in_weight,
    const OptionalTensor& in_bias, double in_eps) {
  const char* op = "max_pool2d_backward";
  const PoolGeometry g = check_pool_of(op, input, kernel_size, stride, padding);
  const DType dtype = check_dtype(op, "input", input);
  const ScalarType type = input.scalar_type();
  check_cpu(op, "dy", dy);
  const std::array<int64_t, 4> output = {g.n, g.c, g.oh, g.ow};
  if (dy.dim() != 4 || !std::equal(output.begin(), output.end(), dy.sizes().begin())) {
    fail(op, "dy must be of shape ", shape_string(output), ", got ", shape_string(dy));
  }
  check_same_dtype(op, "dy", dy, "input", input);
  const auto bn = check_prologue(op, input, in_mean, in_var, in_weight, in_bias, in_eps);

  const Tensor pixels = as_channels_last(input);
  const Tensor upstream = as_channels_last(dy);
  Tensor dinput = empty_channels_last(input.sizes(), type);
  // Blocks of an image's rows depend on the shape only: the sums have the same bits for every
  // number of threads. At the seams a row of windows is looked at twice.
  const int64_t row_elements = g.iw * g.c;
  int64_t blocks = 1;  // of each image
  if (dinput.numel() > 0) {
    constexpr int64_t enough_blocks = 64;
    const int64_t fewest_rows = std::max(2 * g.kh, ceil_div(kGrainElements, row_elements));
    blocks = std::clamp(g.ih / fewest_rows, int64_t{1}, ceil_div(enough_blocks, g.n));
  }
  std::vector<double> sums(bn.has_value() ? g.n * blocks * 2 * g.c : 0);
  if (dinput.numel() > 0) {
    const ChannelRows rows(pixels, dtype);
    const PrologueVectors prologue(bn, rows);
    const int64_t lanes = kernels().vector_bytes / rows.scalar_bytes();
    const MaxPoolBackwardArgs args{
        .geometry = g,
        .dy = upstream.const_data_ptr(),
        .input = pixels.const_data_ptr(),
        .dinput = dinput.mutable_data_ptr(),
        .mean = prologue.mean.data(),
        .scale = prologue.scale.data(),
        .bias = prologue.bias.data(),
        .stream = streams(dinput),
        .sums = nullptr,
        .taps_rows = ceil_div(g.kh, g.stride_h),
        .taps_pitch = ceil_div(g.c, lanes) * lanes,
        .workspace = nullptr,
    };
    const auto kernel = kernels().max_pool2d_backward[static_cast<int>(dtype)][bn.has_value()];
    const size_t workspace_bytes =
        (args.taps_rows * g.ow * args.taps_pitch + 2 * g.c) * rows.scalar_bytes();
    const int64_t block_elements = ceil_div(g.ih, blocks) * row_elements;
    const int64_t grain = std::max<int64_t>(1, kGrainElements / block_elements);
    parallel_for(0, g.n * blocks, grain, [&](int64_t begin, int64_t end) {
      const Scratch workspace(workspace_bytes);
      MaxPoolBackwardArgs block_args = args;
      block_args.workspace = workspace.floats();
      for (int64_t block = begin; block < end; ++block) {
        if (bn.has_value()) block_args.sums = sums.data() + block * 2 * g.c;
        const int64_t image = block / blocks, part = block % blocks;
        kernel(block_args, image, part * g.ih / blocks, (part + 1) * g.ih / blocks);
      }
    });
  }

  BatchNormGradients gradients;
  if (bn.has_value()) {
    std::vector<double> sum_g(g.c, 0.0), sum_gx(g.c, 0.0);
    for (int64_t block = 0; block < g.n * blocks; ++block) {
      const double* block_sums = sums.data() + block * 2 * g.c;
      for (int64_t c = 0; c < g.c; ++c) {
        sum_g[c] += block_sums[c];
        sum_gx[c] += block_sums[g.c + c];
      }
    }
    gradients = BatchNormGradients(*bn, sum_g, sum_gx);
  }
  // Absent results are tensors of their own: a result must not be an alias of another.
  const auto result = [&](bool present, const std::vector<double>& values) {
    return present ? to_channel_vector(values, type) : empty_vector(0, parameter_dtype(type));
  };
  return {dinput, result(bn.has_value(), gradients.mean), result(bn.has_value(), gradients.var),
          result(in_weight.has_value(), gradients.weight),
          result(in_bias.has_value(), gradients.bias)};
}

}  // namespace fastres::cpu
