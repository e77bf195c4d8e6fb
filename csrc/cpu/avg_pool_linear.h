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
  // For images of so many channels, of the dtype of `like`, which messages call input.
  AvgPoolLinear(const char* op, const Tensor& like, int64_t channels, const Tensor& weight,
                const OptionalTensor& bias);

  int64_t outputs() const { return outputs_; }

  // Of dense channels_last images; the output is (images, outputs).
  void run(const void* input, int64_t images, int64_t pixels, void* output) const;

 private:
  DType dtype_;
  int64_t channels_, outputs_;
  Tensor weight_;
  OptionalTensor bias_;
};

}  // namespace fastres::cpu
