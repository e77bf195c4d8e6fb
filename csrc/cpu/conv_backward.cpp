#include <array>

#include "backward_sweep.h"
#include "channel_rows.h"
#include "ops.h"
#include "tensor_checks.h"

namespace fastres::cpu {
namespace {

constexpr const char* kOp = "conv_stats_backward";

struct ConvShape {
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;
};

std::array<int64_t, 2> check_pair(const char* name, const std::vector<int64_t>& values,
                                  int64_t smallest) {
  const bool valid = values.size() == 2 && values[0] >= smallest && values[1] >= smallest;
  if (!valid) {
    fail(kOp, name, " must be two integers >= ", smallest, ", got ",
         shape_string({values.data(), values.size()}));
  }
  return {values[0], values[1]};
}

// Checks that z can be the convolution's output.
void check_convolution(const Tensor& input, const Tensor& weight, const Tensor& z,
                       const ConvShape& conv) {
  check_cpu(kOp, "weight", weight);
  check_same_dtype(kOp, "weight", weight, "input", input);
  if (conv.groups < 1 || input.size(1) % conv.groups != 0) {
    fail(kOp, "groups must be a divisor of input's ", input.size(1), " channels, got ",
         conv.groups);
  }
  if (weight.dim() != 4 || weight.size(1) != input.size(1) / conv.groups ||
      weight.size(0) % conv.groups != 0) {
    fail(kOp, "weight must be of shape (multiple of ", conv.groups, ", ",
         input.size(1) / conv.groups, ", kernel height, kernel width), got ", shape_string(weight));
  }
  std::array<int64_t, 4> expected = {input.size(0), weight.size(0), 0, 0};
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = conv.dilation[d] * (weight.size(2 + d) - 1) + 1;
    const int64_t steps = input.size(2 + d) + 2 * conv.padding[d] - reach;
    if (weight.size(2 + d) < 1 || steps < 0) {
      fail(kOp, "weight must be a kernel within the padded input, got ", shape_string(weight),
           " and input ", shape_string(input));
    }
    expected[2 + d] = steps / conv.stride[d] + 1;
  }
  for (int d = 0; d < 4; ++d) {
    if (z.dim() != 4 || z.size(d) != expected[d]) {
      fail(kOp, "z must be of shape ", shape_string(expected), ", got ", shape_string(z));
    }
  }
}

// dz + dmean/n + dvar*2*(z - mean)/n: z's gradient, its mean's and its variance's as one.
Tensor gradient_of_output(const Tensor& dz, const Tensor& dmean, const Tensor& dvar,
                          const Tensor& z, const Tensor& mean, DType dtype) {
  const Tensor dz_rows = as_channels_last(dz);
  const Tensor z_rows = as_channels_last(z);
  Tensor dzt = empty_channels_last(z.sizes(), z.scalar_type());
  const ChannelRows rows(z_rows, dtype);
  if (rows.numel == 0) return dzt;
  const double n = static_cast<double>(rows.numel / rows.channels);
  std::vector<double> constant = channel_values(dmean, rows.channels, 0.0);
  std::vector<double> slope = channel_values(dvar, rows.channels, 0.0);
  for (int64_t c = 0; c < rows.channels; ++c) {
    constant[c] /= n;
    slope[c] *= 2.0 / n;
  }
  const TiledVector tiled_mean(rows, channel_values(mean, rows.channels, 0.0)),
      tiled_constant(rows, constant), tiled_slope(rows, slope);
  const BnStatsBackwardArgs args{
      .dz = dz_rows.const_data_ptr(),
      .z = z_rows.const_data_ptr(),
      .dzt = dzt.mutable_data_ptr(),
      .mean = tiled_mean.data(),
      .constant = tiled_constant.data(),
      .slope = tiled_slope.data(),
      .period = rows.period,
  };
  const auto kernel = kernels().bn_stats_backward[static_cast<int>(dtype)];
  rows.parallel_for([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return dzt;
}

// The BatchNorm and ReLU that the convolution applies as it loads its input.
struct Prologue {
  BatchNorm bn;
  ChannelRows rows;
  TiledVector mean, scale, bias;

  Prologue(BatchNorm in_bn, const Tensor& input, DType dtype)
      : bn(std::move(in_bn)),
        rows(input, dtype),
        mean(rows, bn.mean),
        scale(rows, bn.scale),
        bias(rows, bn.bias) {}

  Tensor apply(const Tensor& input) const {
    Tensor a = empty_channels_last(input.sizes(), input.scalar_type());
    if (rows.numel == 0) return a;
    BnAddReluArgs args{};
    args.z = input.const_data_ptr();
    args.y = a.mutable_data_ptr();
    args.mean = mean.data();
    args.scale = scale.data();
    args.bias = bias.data();
    args.period = rows.period;
    const auto kernel =
        kernels().bn_add_relu[static_cast<int>(rows.dtype)][static_cast<int>(Residual::none)][true];
    rows.parallel_for([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return a;
  }

  // Turns da into the input's gradient in place; returns the sums that the vectors' ones need.
  RowSums backward(const Tensor& da, const Tensor& input) const {
    BnAddReluBackwardArgs args{};
    args.dy = da.const_data_ptr();
    args.z = input.const_data_ptr();
    args.dz = da.mutable_data_ptr();
    args.mean = mean.data();
    args.scale = scale.data();
    args.bias = bias.data();
    args.period = rows.period;
    return backward_sweep(rows, kernels().prologue_backward[static_cast<int>(rows.dtype)], args);
  }
};

// The gradient in weight's memory format: channels_last only where weight has no other.
Tensor in_format_of(const Tensor& weight, const Tensor& dweight) {
  const bool channels_last = !weight.is_contiguous() && is_channels_last(weight);
  return torch::stable::contiguous(
      dweight, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// (gradient of a, gradient of weight) of conv(a, weight), each where asked for.
std::pair<OptionalTensor, OptionalTensor> convolution_backward(const Tensor& dzt, const Tensor& a,
                                                               const Tensor& weight,
                                                               const ConvShape& conv,
                                                               bool needs_input,
                                                               bool needs_weight) {
  using Ints = std::vector<int64_t>;
  const auto ints = [](const std::array<int64_t, 2>& pair) {
    return Ints(pair.begin(), pair.end());
  };
  const std::array<bool, 3> mask = {needs_input, needs_weight, false};
  const auto [da, dweight, dbias] = call_aten<Tensor, Tensor, Tensor>(
      "aten::convolution_backward", "", dzt, a, weight, std::optional<Ints>(), ints(conv.stride),
      ints(conv.padding), ints(conv.dilation), false, Ints{0, 0}, conv.groups,
      torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
  return {needs_input ? OptionalTensor(da) : std::nullopt,
          needs_weight ? OptionalTensor(dweight) : std::nullopt};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_stats_backward(
    const Tensor& dz, const Tensor& dmean, const Tensor& dvar, const Tensor& input,
    const Tensor& weight, const Tensor& z, const Tensor& mean, const OptionalTensor& in_mean,
    const OptionalTensor& in_var, const OptionalTensor& in_weight, const OptionalTensor& in_bias,
    double in_eps, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool needs_input, bool needs_weight) {
  const DType dtype = check_images(kOp, "input", input);
  const ScalarType type = input.scalar_type();
  const ConvShape conv{check_pair("stride", stride, 1), check_pair("padding", padding, 0),
                       check_pair("dilation", dilation, 1), groups};
  check_cpu(kOp, "z", z);
  check_same_dtype(kOp, "z", z, "input", input);
  check_convolution(input, weight, z, conv);
  check_like(kOp, "dz", dz, "z", z);
  const auto out_vector = [&](const char* name, const Tensor& t) {
    return check_channel_vector(kOp, name, t, z.size(1), type);
  };
  const Tensor dmean_vector = out_vector("dmean", dmean);
  const Tensor dvar_vector = out_vector("dvar", dvar);
  const Tensor mean_vector = out_vector("mean", mean);

  const Tensor input_rows = as_channels_last(input);
  std::optional<Prologue> prologue;
  if (in_mean.has_value() != in_var.has_value()) {
    fail(kOp, "in_mean and in_var must be given together, got one of them only");
  }
  if (!in_mean.has_value() && (in_weight.has_value() || in_bias.has_value())) {
    fail(kOp, in_weight.has_value() ? "in_weight" : "in_bias",
         " must be None where in_mean is None, got a tensor");
  }
  if (in_mean.has_value()) {
    const auto in_vector = [&](const char* name, const auto& t) {
      return check_channel_vector(kOp, name, t, input.size(1), type);
    };
    prologue.emplace(
        BatchNorm(in_vector("in_mean", *in_mean), in_vector("in_var", *in_var),
                  in_vector("in_weight", in_weight), in_vector("in_bias", in_bias), in_eps),
        input_rows, dtype);
  }

  Tensor dinput = empty_vector(0, type), dweight = empty_vector(0, type);
  BatchNormGradients gradients;
  if (needs_input || needs_weight) {
    const Tensor dzt = gradient_of_output(dz, dmean_vector, dvar_vector, z, mean_vector, dtype);
    {
      const Tensor a = prologue && needs_weight ? prologue->apply(input_rows) : input_rows;
      const auto [da, dw] = convolution_backward(dzt, a, weight, conv, needs_input, needs_weight);
      if (da.has_value()) dinput = as_channels_last(*da);
      if (dw.has_value()) dweight = in_format_of(weight, *dw);
    }
    if (prologue && needs_input) {
      const RowSums sums = prologue->backward(dinput, input_rows);
      gradients = BatchNormGradients(prologue->bn, sums[0], sums[1]);
    }
  }
  const auto result = [&](bool present, const std::vector<double>& values) {
    return present ? to_channel_vector(values, type) : empty_vector(0, parameter_dtype(type));
  };
  const bool prologue_gradients = prologue.has_value() && needs_input;
  return {dinput,
          dweight,
          result(prologue_gradients, gradients.mean),
          result(prologue_gradients, gradients.var),
          result(prologue_gradients && in_weight.has_value(), gradients.weight),
          result(prologue_gradients && in_bias.has_value(), gradients.bias)};
}

}  // namespace fastres::cpu
