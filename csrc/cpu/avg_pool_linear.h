// What a chain shares with the op avg_pool_linear.
#pragma once

#include <cstdint>

#include "kernel_table.h"
#include "ops.h"

namespace fastres::cpu {

// A linear layer after the mean over the pixels, its weight and bias as they are now, checked and
// contiguous.
class AvgPoolLinear {
 public:
  // What messages call the op and its arguments.
  struct Names {
    const char *op, *weight, *bias;
  };

  // For images of so many channels, of the dtype of `input`.
  AvgPoolLinear(const Names& names, const Tensor& input, int64_t channels, const Tensor& weight,
                const OptionalTensor& bias);

  // An uninitialised result.
  Tensor empty(int64_t images) const;

  // Of dense channels_last images; the output is (images, outputs).
  void run(const void* input, int64_t images, int64_t pixels, void* output) const;

 private:
  DType dtype_;
  torch::headeronly::ScalarType type_;
  int64_t channels_, outputs_;
  Tensor weight_;
  OptionalTensor bias_;
};

}  // namespace fastres::cpu
