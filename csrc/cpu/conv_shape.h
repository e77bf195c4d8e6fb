// A convolution's sizes, as every algorithm of its forward sees them.
#pragma once

#include <array>
#include <cstdint>

#include "conv_kernel.h"

namespace fastres::cpu {

struct ConvShape {
  int64_t n, ci, ih, iw, co, oh, ow, kh, kw;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;

  std::array<int64_t, 4> output() const { return {n, co, oh, ow}; }
  int64_t pixels() const { return n * oh * ow; }
  int64_t panels() const { return (co + kConvPanel - 1) / kConvPanel; }
  int64_t packed_floats() const { return panels() * kConvPanel * ci * kh * kw; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastres::cpu
