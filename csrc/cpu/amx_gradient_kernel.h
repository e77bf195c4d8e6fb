// The interface between amx_gradient.cpp and amx_gradient_kernel.inl: a convolution's weight
// gradient in float32 by AMX's products of bfloat16 tiles, of float32 or bfloat16 images.
//
// A float is the sum of three bfloat16 numbers, high + middle + low. Of the nine products of two
// floats' parts the six largest are added up, in float32: what is left out is below their rounding.
// Numbers of bfloat16 images have one part. Tiles are of 16 input by 16 output channels, and a
// product adds up 32 pixels.
#pragma once

#include <cstdint>

#include "conv_amx_kernel.h"
#include "conv_kernel.h"
#include "winograd_kernel.h"

namespace fastres::cpu {

// Channels in a panel, two tiles of 16, and pixels in a tile's product.
inline constexpr int64_t kAmxPanel = 32, kAmxPixels = 32;

struct AmxGradientArgs {
  ConvArgs conv;  // its input, prologue, padding, strides and sizes
  // Dense (n, oh, ow, co): the gradient is dz, or with z dz + constant + slope * (z - mean).
  const void* dz;
  const void* z;
  const float* mean;
  const float* constant;
  const float* slope;
};

// What one call adds: output pixels of `groups` times `images` images from n0 on, of them those
// before n1, rows [h0, h1) and columns [w0, w1), for channels from multiples of kAmxPanel on.
struct AmxGradientBlock {
  int64_t n0, n1, groups, images;
  int64_t h0, h1, w0, w1;
  int64_t ci0, ci1, co0, co1;
};

// Pixels are in the order [group][row][column][image], a row's filled up to whole products. The
// input's rows are split by their remainders of the division by the stride, so that a tap in a
// column is a shift by rows. A row comes in variants: column c of variant v is the input's column
// c * stride + v - padding. Tap kw is variant kw % variants from column kw / variants on: a shift
// is by whole products, so that tiles begin at cache lines, or there are as many variants as taps.
struct AmxGradientLayout {
  int64_t phases, variants, columns;
  int64_t rows;                                    // of a phase of a group
  int64_t variant_row, window;                     // pixels; the window is all of the input's
  int64_t gradient_row, gradient_group, gradient;  // pixels
};

struct AmxGradientScratch {
  int64_t* offsets;  // window or gradient, the larger
  // [panels of input channels][variants][phases][groups][rows][variant_row / 32][parts][32][32]
  uint16_t* left;
  uint16_t* right;  // [panels of output channels][gradient / 2][parts][kAmxPanel][2]
};

// Sums are [panels of input channels][panels of output channels][taps][2][2][16][16].
inline constexpr int64_t kAmxSumFloats = kAmxPanel * kAmxPanel;

// Adds to sums, or sets them. With `out`, the block is all that there is of the gradient's part: it
// is written, and sums hold one pair of panels at a time. False where a result is not finite.
using AmxGradientFn = bool (*)(const AmxGradientArgs&, const AmxGradientBlock&,
                               const AmxGradientLayout&, const AmxGradientScratch&, float* sums,
                               bool add, const WinogradKernelGradient* out);

// Adds up `count` sums, each `distance` floats after the one before, whose panels of output
// channels are [.., panels, ..], and writes panel `panel` of them: the gradient of output channels
// [co0, co1) and input channels [ci0, ci1). False where a result is not finite.
struct AmxGradientEnd {
  float* sums;
  int64_t distance;
  int count;
  int64_t panel, panels;
  int64_t ci0, ci1, co0, co1;
};
using AmxGradientEndFn = bool (*)(const ConvArgs&, const AmxGradientEnd&,
                                  const WinogradKernelGradient&);

}  // namespace fastres::cpu
