// The interface between conv.cpp and conv_kernel.inl: an implicit GEMM over packed weights.
#pragma once

#include <cstdint>

namespace fastres::cpu {

// Output channels in a panel of packed weights, which are [ceil(co/16)][kh][kw][ci][16].
inline constexpr int kConvPanel = 16;

struct ConvArgs {
  // (n, ih, iw, ci) with channels next to each other; the other strides, in elements, are free.
  const void* input;
  int64_t input_stride_n, input_stride_h, input_stride_w;
  int64_t n, ih, iw, ci;
  // Prologue relu((input - in_mean) * in_scale + in_bias), or null; padded to whole panels.
  const float* in_mean;
  const float* in_scale;
  const float* in_bias;
  // Whether each block copies its input, padded and after the prologue, into float rows. Without
  // it the input must be float32, unpadded, and dense in w where kw > 1.
  bool window;

  const float* weight;  // packed
  int64_t kh, kw, stride_h, stride_w, pad_h, pad_w;

  void* output;  // dense (n, oh, ow, co)
  bool stream;   // whether it is written past the caches
  int64_t oh, ow, co;
  // Epilogue relu(scale * accumulator + shift + residual): scale and shift are null or padded to
  // whole panels; the residual is null or dense as the output.
  const float* scale;
  const float* shift;
  const void* residual;
  bool relu;
};

// A convolution's bias and the BatchNorm after it, a number a channel; null for 0 (weight: for 1).
struct ConvNorm {
  const float *bias, *mean, *var, *bn_weight, *bn_bias;
  double eps;
};

// ConvArgs's scale and shift, which are padded to whole panels with zeros. In double inside.
using ConvFoldFn = void (*)(const ConvNorm&, int64_t channels, float* scale, float* shift);

// What one call computes: output pixels [n0, n1) x [h0, h1) x [w0, w1), where n1 - n0 is 1 unless
// the other two are whole images, and panels [panel0, panel1) of output channels.
struct ConvBlock {
  int64_t n0, n1, h0, h1, w0, w1;
  int64_t panel0, panel1;
};

struct ConvScratch {
  const float** rows;  // one a pixel of the block
  int64_t* offsets;    // one a pixel of the block
  float* window;       // conv_window_floats(), where args.window
};

// Statistics of z are taken in tiles of rows. With q near a tile's mean, r its rows and s their
// sum, a tile adds s, q * (2 * s - r * q) and the sum of (z - q)^2 to three sums of each channel.
// Then mean = s0 / n and variance = (s1 + s2 - s0 * mean) / n, which in double lose nothing.
inline constexpr int kConvSums = 3;

using ConvBlockFn = void (*)(const ConvArgs&, const ConvBlock&, const ConvScratch&, double* sums);

// Strides in elements. Writes panels [panel0, panel1) of `packed`.
struct ConvWeight {
  const float* data;
  int64_t stride_o, stride_i, stride_h, stride_w;
  int64_t co, ci, kh, kw;
};
using ConvPackFn = void (*)(const ConvWeight&, float* packed, int64_t panel0, int64_t panel1);

// Adds to sums, (3, channels) as above, those of rows of a dense matrix (rows, channels).
using ChannelSumsFn = void (*)(const void* z, int64_t rows, int64_t channels, double* sums);

}  // namespace fastres::cpu
