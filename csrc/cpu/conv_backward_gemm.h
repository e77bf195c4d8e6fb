// Gradients of a float32 convolution as matrix products over blocks of output pixels that stay in
// cache: what comes before and after each product is done on the block as well.
#pragma once

#include "kernel_table.h"

namespace fastres::cpu {

struct ConvBackwardGemm {
  ConvGeometry geometry;
  const float* dzt = nullptr;      // (rows, co); null: computed by block, from
  BnStatsBackwardArgs dzt_args{};  // whose dzt is not set
  const float* input;              // (n, ih, iw, ci)
  const float* weight;             // (co, kh, kw, ci), for dinput
  // Prologue relu((input - mean) * scale + bias), tiled to the period, or null.
  const float* in_mean = nullptr;
  const float* in_scale = nullptr;
  const float* in_bias = nullptr;
  int64_t in_period = 0;

  float* dweight = nullptr;  // (co, kh, kw, ci); null: not asked for
  // (n, ih, iw, ci); null: not asked for. Pointwise, it is the gradient of the input, and in_sums
  // (2, in_period) gets the sums of the prologue's backward. Else the gradient of what the prologue
  // gives is added to the zeros that it must be.
  float* dinput = nullptr;
  double* in_sums = nullptr;

  // Whether each output pixel is made of the input pixel in the same place alone.
  bool pointwise() const;

  void run() const;

 private:
  void run_part(int64_t begin, int64_t end, int64_t block_rows, float* part_dweight,
                double* part_sums) const;
};

}  // namespace fastres::cpu
