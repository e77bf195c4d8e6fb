// Every op of fastres: its schema, and which C++ function computes it on a CPU.
//
// Python (fastres/ops) adds to each op its shape function, its gradient, the Triton kernels for
// CUDA, and the plain-torch reference for every other device. What each op means is said there.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY(fastres, m) {
  m.def("add_relu(Tensor input, Tensor residual) -> Tensor");
  m.def("add_relu_backward(Tensor dy, Tensor y) -> Tensor");

  m.def(
      "bn_add_relu(Tensor z, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, "
      "Tensor? residual_bias, float residual_eps, bool relu) -> Tensor");
  m.def(
      "bn_add_relu_backward(Tensor dy, Tensor y, Tensor z, Tensor mean, Tensor var, "
      "Tensor? weight, float eps, Tensor? residual, Tensor? residual_mean, Tensor? residual_var, "
      "Tensor? residual_weight, float residual_eps, bool relu) -> "
      "(Tensor dz, Tensor dmean, Tensor dvar, Tensor dweight, Tensor dbias, Tensor dresidual, "
      "Tensor dresidual_mean, Tensor dresidual_var, Tensor dresidual_weight, "
      "Tensor dresidual_bias)");

  m.def(
      "max_pool2d(Tensor input, int[] kernel_size, int[] stride, int[] padding, Tensor? in_mean, "
      "Tensor? in_var, Tensor? in_weight, Tensor? in_bias, float in_eps) -> Tensor");
  m.def(
      "max_pool2d_backward(Tensor dy, Tensor input, int[] kernel_size, int[] stride, "
      "int[] padding, Tensor? in_mean, Tensor? in_var, Tensor? in_weight, Tensor? in_bias, "
      "float in_eps) -> "
      "(Tensor dinput, Tensor din_mean, Tensor din_var, Tensor din_weight, Tensor din_bias)");

  m.def("avg_pool_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");

  m.def(
      "pack_conv_weight(Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
      "int[] input_size) -> Tensor");
  m.def(
      "conv_bn_relu(Tensor input, Tensor weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? residual, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool relu, Tensor? packed) "
      "-> Tensor");

  m.def(
      "conv_chain(Tensor input, Tensor[] tensors, int[] program, float[] eps, "
      "Tensor? fc_weight=None, Tensor? fc_bias=None) -> Tensor");

  m.def(
      "conv_stats(Tensor input, Tensor weight, Tensor? in_mean, Tensor? in_var, "
      "Tensor? in_weight, Tensor? in_bias, float in_eps, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> (Tensor z, Tensor mean, Tensor var)");
  m.def(
      "conv_stats_backward(Tensor dz, Tensor dmean, Tensor dvar, Tensor input, Tensor weight, "
      "Tensor z, Tensor mean, Tensor? in_mean, Tensor? in_var, Tensor? in_weight, "
      "Tensor? in_bias, float in_eps, int[] stride, int[] padding, int[] dilation, int groups, "
      "bool needs_input, bool needs_weight) -> "
      "(Tensor dinput, Tensor dweight, Tensor din_mean, Tensor din_var, Tensor din_weight, "
      "Tensor din_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  namespace cpu = fastres::cpu;
  m.impl("add_relu", TORCH_BOX(&cpu::add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&cpu::add_relu_backward));

  m.impl("bn_add_relu", TORCH_BOX(&cpu::bn_add_relu));
  m.impl("bn_add_relu_backward", TORCH_BOX(&cpu::bn_add_relu_backward));

  m.impl("max_pool2d", TORCH_BOX(&cpu::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&cpu::max_pool2d_backward));

  m.impl("avg_pool_linear", TORCH_BOX(&cpu::avg_pool_linear));

  m.impl("pack_conv_weight", TORCH_BOX(&cpu::pack_conv_weight));
  m.impl("conv_bn_relu", TORCH_BOX(&cpu::conv_bn_relu));
  m.impl("conv_chain", TORCH_BOX(&cpu::conv_chain));

  m.impl("conv_stats", TORCH_BOX(&cpu::conv_stats));
  m.impl("conv_stats_backward", TORCH_BOX(&cpu::conv_stats_backward));
}
