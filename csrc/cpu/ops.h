// The CPU operators. What each one means is said in fastres/ops; schemas are in register.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "visibility.h"

namespace fastres::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor add_relu(const Tensor& input, const Tensor& residual);

Tensor add_relu_backward(const Tensor& dy, const Tensor& y);

Tensor bn_add_relu(const Tensor& z, const Tensor& mean, const Tensor& var,
                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                   const OptionalTensor& residual, const OptionalTensor& residual_mean,
                   const OptionalTensor& residual_var, const OptionalTensor& residual_weight,
                   const OptionalTensor& residual_bias, double residual_eps, bool relu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
bn_add_relu_backward(const Tensor& dy, const Tensor& y, const Tensor& z, const Tensor& mean,
                     const Tensor& var, const OptionalTensor& weight, double eps,
                     const OptionalTensor& residual, const OptionalTensor& residual_mean,
                     const OptionalTensor& residual_var, const OptionalTensor& residual_weight,
                     double residual_eps, bool relu);

Tensor max_pool2d(const Tensor& input, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const OptionalTensor& in_mean, const OptionalTensor& in_var,
                  const OptionalTensor& in_weight, const OptionalTensor& in_bias, double in_eps);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> max_pool2d_backward(
    const Tensor& dy, const Tensor& input, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const OptionalTensor& in_mean, const OptionalTensor& in_var, const OptionalTensor& in_weight,
    const OptionalTensor& in_bias, double in_eps);

Tensor avg_pool_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

// Length of pack_conv_weight's result for a weight (co, ci, kh, kw) of the dtype of this name.
FASTRES_EXPORTED int64_t packed_conv_weight_numel(
    const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
    const std::vector<int64_t>& input_size, const std::string& dtype_name);

Tensor pack_conv_weight(const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        int64_t groups, const std::vector<int64_t>& input_size);

// Name of the algorithm of conv_bn_relu (with the weights packed for it, in float32) or, in
// training, of conv_stats, for sizes (n, ci, ih, iw) and (co, ci / groups, kh, kw).
FASTRES_EXPORTED std::string conv_algorithm(const std::vector<int64_t>& input,
                                            const std::vector<int64_t>& weight,
                                            const std::vector<int64_t>& stride,
                                            const std::vector<int64_t>& padding,
                                            const std::vector<int64_t>& dilation, int64_t groups,
                                            const std::string& dtype_name, bool training);

Tensor conv_bn_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& running_mean, const Tensor& running_var,
                    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps,
                    const OptionalTensor& residual, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                    int64_t groups, bool relu, const OptionalTensor& packed);

Tensor conv_chain(const Tensor& input, const std::vector<Tensor>& tensors,
                  const std::vector<int64_t>& program, const std::vector<double>& eps,
                  const OptionalTensor& fc_weight, const OptionalTensor& fc_bias);

std::tuple<Tensor, Tensor, Tensor> conv_stats(
    const Tensor& input, const Tensor& weight, const OptionalTensor& in_mean,
    const OptionalTensor& in_var, const OptionalTensor& in_weight, const OptionalTensor& in_bias,
    double in_eps, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_stats_backward(
    const Tensor& dz, const Tensor& dmean, const Tensor& dvar, const Tensor& input,
    const Tensor& weight, const Tensor& z, const Tensor& mean, const OptionalTensor& in_mean,
    const OptionalTensor& in_var, const OptionalTensor& in_weight, const OptionalTensor& in_bias,
    double in_eps, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool needs_input, bool needs_weight);

}  // namespace fastres::cpu
