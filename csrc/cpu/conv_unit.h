// conv_bn_relu in two steps: what does not need the images comes first. A chain takes that step for
// all its units before the first convolution, whose weights drive the code for it out of the
// caches.
#pragma once

#include <array>
#include <vector>

#include "conv_algorithm.h"
#include "max_pool2d_kernel.h"
#include "memory.h"
#include "ops.h"
#include "tensor_checks.h"

namespace fastres::cpu {

class ConvUnit {
 public:
  // Checks all but the images, which will be of `input`'s sizes and of the dtype and device of
  // `images`; folds the BatchNorm.
  ConvUnit(const Tensor& images, const std::array<int64_t, 4>& input, const Tensor& weight,
           const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
           const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps,
           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
           const std::vector<int64_t>& dilation, int64_t groups, bool relu,
           const OptionalTensor& packed);

  std::array<int64_t, 4> output() const { return shape_.output(); }
  Algorithm algorithm() const { return algorithm_; }

  Tensor run(const Tensor& input, const OptionalTensor& residual) const;
  // And a max-pool of it.
  Tensor run(const Tensor& input, const OptionalTensor& residual, const PoolGeometry& pool) const;

 private:
  void set_epilogue(ConvArgs& args, const Tensor& y) const;

  ConvShape shape_;
  DType dtype_;
  ScalarType type_;
  Tensor weight_;
  OptionalTensor packed_;
  bool relu_;
  Algorithm algorithm_;
  const char* reason_;  // of the algorithm
  // relu?((z - mean) * scale + bias) after torch's convolution, or scale and shift in ours.
  std::vector<double> mean_, scale_, bias_;
  Scratch folded_;
};

}  // namespace fastres::cpu
