// conv_bn_relu in steps, so that a chain can take all but the last for all its units first: the
// weights of a convolution drive the code of the others out of the caches.
#pragma once

#include <array>
#include <vector>

#include "conv_algorithm.h"
#include "max_pool2d_kernel.h"
#include "memory.h"
#include "ops.h"
#include "tensor_checks.h"

namespace fastres::cpu {

// Images whose channels are next to each other; the other strides in elements.
struct Pixels {
  const void* data;
  int64_t stride_n, stride_h, stride_w;
};

// `input` itself where pixels hold their channels next to each other, as slices of channels_last
// images do.
inline Tensor with_dense_channels(const Tensor& input) {
  if (input.size(1) == 1 || input.stride(1) == 1) return input;
  return as_channels_last(input);
}

inline Pixels pixels_of(const Tensor& dense) {
  return {dense.const_data_ptr(), dense.stride(0), dense.stride(2), dense.stride(3)};
}

class ConvUnit {
 public:
  // Checks all but the images, which will be of `input`'s sizes and of the dtype and device of
  // `images`, and the vectors, which may be others by the time that they are folded.
  ConvUnit(const Tensor& images, const std::array<int64_t, 4>& input, const Tensor& weight,
           const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
           const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps,
           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
           const std::vector<int64_t>& dilation, int64_t groups, bool relu,
           const OptionalTensor& packed);

  std::array<int64_t, 4> output() const { return shape_.output(); }
  Algorithm algorithm() const { return algorithm_; }

  // The BatchNorm and the bias as a scale and a shift, for algorithms of ours.
  int64_t folded_floats() const;
  void fold(float* folded) const;

  // Fails where a residual of such sizes cannot be added.
  void check_residual(const std::array<int64_t, 4>& residual) const;

  // By an algorithm of ours, for at least one pixel. The residual, if there is one, and the output
  // are dense; the output is a max-pool's where there is a pool.
  void run(const Pixels& input, const void* residual, const float* folded, const PoolGeometry* pool,
           void* output) const;

  // All steps, by any algorithm.
  Tensor run(const Tensor& input, const OptionalTensor& residual, const PoolGeometry* pool) const;

 private:
  struct Vectors;
  template <typename T>
  T vector(const char* name, const T& t) const;

  ConvShape shape_;
  DType dtype_;
  ScalarType type_;
  Tensor weight_, running_mean_, running_var_;
  OptionalTensor bias_, bn_weight_, bn_bias_, packed_;
  double eps_;
  bool relu_;
  Algorithm algorithm_;
  const char* reason_;  // of the algorithm
};

}  // namespace fastres::cpu
