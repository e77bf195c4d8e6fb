#include "backward_sweep.h"
#include "channel_rows.h"
#include "ops.h"
#include "tensor_checks.h"

namespace fastres::cpu {
namespace {

// Which kernel the shortcut asks for; names arguments that contradict each other.
Residual check_residual(const char* op, const Tensor& z, const OptionalTensor& residual,
                        const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
                        const OptionalTensor& residual_weight,
                        const OptionalTensor& residual_bias) {
  if (residual.has_value()) check_like(op, "residual", *residual, "z", z);
  if (residual_mean.has_value()) {
    if (!residual.has_value()) {
      fail(op, "residual must be given where residual_mean is, got None");
    }
    if (!residual_var.has_value()) {
      fail(op, "residual_var must be given where residual_mean is, got None");
    }
    return Residual::bn;
  }
  const auto must_be_none = [&](const char* name, const OptionalTensor& t) {
    if (t.has_value()) {
      fail(op, name, " must be None where residual_mean is None, got a tensor of shape ",
           shape_string(*t));
    }
  };
  must_be_none("residual_var", residual_var);
  must_be_none("residual_weight", residual_weight);
  must_be_none("residual_bias", residual_bias);
  return residual.has_value() ? Residual::plain : Residual::none;
}

}  // namespace

Tensor bn_add_relu(const Tensor& z, const Tensor& mean, const Tensor& var,
                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                   const OptionalTensor& residual, const OptionalTensor& residual_mean,
                   const OptionalTensor& residual_var, const OptionalTensor& residual_weight,
                   const OptionalTensor& residual_bias, double residual_eps, bool relu) {
  const char* op = "bn_add_relu";
  const DType dtype = check_images(op, "z", z);
  const ScalarType type = z.scalar_type();
  const int64_t channels = z.size(1);
  const auto vector = [&](const char* name, const auto& t) {
    return check_channel_vector(op, name, t, channels, type);
  };
  const Residual shortcut =
      check_residual(op, z, residual, residual_mean, residual_var, residual_weight, residual_bias);
  const BatchNorm bn(vector("mean", mean), vector("var", var), vector("weight", weight),
                     vector("bias", bias), eps);
  std::vector<double> shift = bn.bias;

  const Tensor z_rows = as_channels_last(z);
  const ChannelRows rows(z_rows, dtype);
  Tensor y = empty_channels_last(z.sizes(), type);
  if (rows.numel == 0) return y;
  const Tensor residual_rows = residual.has_value() ? as_channels_last(*residual) : z_rows;
  TiledVector tiled_residual_mean, tiled_residual_scale;
  if (shortcut == Residual::bn) {
    const BatchNorm residual_bn(vector("residual_mean", *residual_mean),
                                vector("residual_var", *residual_var),
                                vector("residual_weight", residual_weight),
                                vector("residual_bias", residual_bias), residual_eps);
    for (int64_t c = 0; c < channels; ++c) shift[c] += residual_bn.bias[c];
    tiled_residual_mean = TiledVector(rows, residual_bn.mean);
    tiled_residual_scale = TiledVector(rows, residual_bn.scale);
  }
  const TiledVector tiled_mean(rows, bn.mean), tiled_scale(rows, bn.scale), tiled_bias(rows, shift);

  const BnAddReluArgs args{
      .z = z_rows.const_data_ptr(),
      .residual = residual_rows.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .mean = tiled_mean.data(),
      .scale = tiled_scale.data(),
      .bias = tiled_bias.data(),
      .residual_mean = tiled_residual_mean.data(),
      .residual_scale = tiled_residual_scale.data(),
      .period = rows.period,
      .stream = streams(y),
  };
  const auto kernel =
      kernels().bn_add_relu[static_cast<int>(dtype)][static_cast<int>(shortcut)][relu];
  rows.parallel_for([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
bn_add_relu_backward(const Tensor& dy, const Tensor& y, const Tensor& z, const Tensor& mean,
                     const Tensor& var, const OptionalTensor& weight, double eps,
                     const OptionalTensor& residual, const OptionalTensor& residual_mean,
                     const OptionalTensor& residual_var, const OptionalTensor& residual_weight,
                     double residual_eps, bool relu) {
  const char* op = "bn_add_relu_backward";
  const DType dtype = check_images(op, "z", z);
  const ScalarType type = z.scalar_type();
  check_like(op, "dy", dy, "z", z);
  if (relu) check_like(op, "y", y, "z", z);
  const auto vector = [&](const char* name, const auto& t) {
    return check_channel_vector(op, name, t, z.size(1), type);
  };
  const Residual shortcut =
      check_residual(op, z, residual, residual_mean, residual_var, residual_weight, std::nullopt);
  const BatchNorm bn(vector("mean", mean), vector("var", var), vector("weight", weight),
                     std::nullopt, eps);
  std::optional<BatchNorm> residual_bn;
  if (shortcut == Residual::bn) {
    residual_bn.emplace(vector("residual_mean", *residual_mean),
                        vector("residual_var", *residual_var),
                        vector("residual_weight", residual_weight), std::nullopt, residual_eps);
  }

  const Tensor z_rows = as_channels_last(z);
  const Tensor dy_rows = as_channels_last(dy);
  const Tensor y_rows = relu ? as_channels_last(y) : dy_rows;
  const ChannelRows rows(z_rows, dtype);
  Tensor dz = empty_channels_last(z.sizes(), type);
  Tensor dresidual =
      shortcut == Residual::none ? empty_vector(0, type) : empty_channels_last(z.sizes(), type);
  BnAddReluBackwardArgs args{};
  args.period = rows.period;
  args.stream = streams(dz);
  args.dy = dy_rows.const_data_ptr();
  args.y = y_rows.const_data_ptr();
  args.z = z_rows.const_data_ptr();
  args.dz = dz.mutable_data_ptr();
  args.dresidual = dresidual.mutable_data_ptr();
  const TiledVector tiled_mean(rows, bn.mean), tiled_scale(rows, bn.scale);
  args.mean = tiled_mean.data();
  args.scale = tiled_scale.data();
  TiledVector tiled_residual_mean, tiled_residual_scale;
  std::optional<Tensor> residual_rows;
  if (shortcut == Residual::bn) {
    residual_rows = as_channels_last(*residual);
    tiled_residual_mean = TiledVector(rows, residual_bn->mean);
    tiled_residual_scale = TiledVector(rows, residual_bn->scale);
    args.residual = residual_rows->const_data_ptr();
    args.residual_mean = tiled_residual_mean.data();
    args.residual_scale = tiled_residual_scale.data();
  }
  const auto kernel =
      kernels().bn_add_relu_backward[static_cast<int>(dtype)][static_cast<int>(shortcut)][relu];
  const RowSums sums = backward_sweep(rows, kernel, args);

  const BatchNormGradients gradients(bn, sums[0], sums[1]);
  // Absent results are tensors of their own: a result must not be an alias of another.
  const auto result = [&](bool present, const std::vector<double>& values) {
    return present ? to_channel_vector(values, type) : empty_vector(0, parameter_dtype(type));
  };
  const BatchNormGradients of_residual = shortcut == Residual::bn
                                             ? BatchNormGradients(*residual_bn, sums[0], sums[2])
                                             : BatchNormGradients();
  return {dz,
          result(true, gradients.mean),
          result(true, gradients.var),
          result(weight.has_value(), gradients.weight),
          result(true, gradients.bias),
          dresidual,
          result(residual_bn.has_value(), of_residual.mean),
          result(residual_bn.has_value(), of_residual.var),
          result(residual_weight.has_value(), of_residual.weight),
          result(residual_bn.has_value(), of_residual.bias)};
}

}  // namespace fastres::cpu
