// What the checked operators of max_pool2d.cpp give to their loops. No torch in here.
#pragma once

#include <cstdint>

namespace fastres::cpu {

// (n, ih, iw, c) -> (n, oh, ow, c); every window has a pixel of the image.
struct PoolGeometry {
  int64_t n, ih, iw, c, oh, ow, kh, kw;
  int64_t stride_h, stride_w, pad_h, pad_w;
};

struct MaxPoolArgs {
  PoolGeometry geometry;
  const void* input;
  void* output;
  // (c,) of the computing type: the prologue relu((input - mean) * scale + bias), or null.
  const void* mean;
  const void* scale;
  const void* bias;
  bool stream;  // whether the output is written past the caches
};

struct MaxPoolBackwardArgs {
  PoolGeometry geometry;
  const void* dy;
  const void* input;
  void* dinput;
  const void* mean;  // the prologue's, or null
  const void* scale;
  const void* bias;
  bool stream;  // whether dinput is written past the caches
  // Sums over the pixels, (2, c), with a prologue: of g and of g * (input - mean).
  double* sums;
  int64_t taps_rows;   // output rows whose windows can have an input row in common
  int64_t taps_pitch;  // c rounded up to whole vectors
  void* workspace;     // taps_rows * ow * taps_pitch + 2 * c of the computing type's size
};

// Output rows [begin, end) of the n * oh.
using MaxPoolFn = void (*)(const MaxPoolArgs&, int64_t begin, int64_t end);

// Input rows [begin, end) of one image.
using MaxPoolBackwardFn = void (*)(const MaxPoolBackwardArgs&, int64_t image, int64_t begin,
                                   int64_t end);

}  // namespace fastres::cpu
