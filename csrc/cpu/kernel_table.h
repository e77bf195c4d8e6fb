// The interface between the checked, threaded operators (<op>.cpp) and the torch-free loops
// (*_kernel.inl): plain structs and one table of function pointers for each instruction set.
#pragma once

#include <cstdint>

#include "amx_gradient_kernel.h"
#include "avg_pool_linear_kernel.h"
#include "conv_amx_kernel.h"
#include "conv_kernel.h"
#include "max_pool2d_kernel.h"
#include "winograd_kernel.h"
#include "winograd_stem_kernel.h"

namespace fastres::cpu {

// Storage formats. Loops compute in float, for double in double.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Index of a storage format in the tables below.
enum class DType { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };
inline constexpr int kDTypes = 4;
inline constexpr const char* kDTypeNames[kDTypes] = {"float32", "bfloat16", "float16", "float64"};

// Shortcut of a block: none, the tensor itself, or the tensor under a BatchNorm of its own.
enum class Residual { none = 0, plain = 1, bn = 2 };
inline constexpr int kResiduals = 3;

// Below, images are dense (N, H, W, C) and per-channel vectors are of the computing type (float,
// for double double). They are tiled: `period` is C or a multiple of it that fills vectors, and
// each per-channel vector holds `period` elements.

struct BnAddReluArgs {
  const void* z;
  const void* residual;
  void* y;
  const void* mean;
  const void* scale;
  const void* bias;  // of both branches
  const void* residual_mean;
  const void* residual_scale;
  int64_t period;
  bool stream;  // whether y is written past the caches
};

// What is zero where: nothing, dy where y <= 0, or dy where (z - mean) * scale + bias <= 0.
enum class Mask { none = 0, output = 1, affine = 2 };

struct BnAddReluBackwardArgs {
  const void* dy;
  const void* y;  // Mask::output
  const void* z;
  const void* residual;  // Residual::bn
  void* dz;              // may be dy
  void* dresidual;
  const void* mean;
  const void* scale;
  const void* bias;  // Mask::affine
  const void* residual_mean;
  const void* residual_scale;
  int64_t period;
  bool stream;  // whether dz and dresidual are written past the caches
  // Sums over the rows, (3, period): of g, of g * (z - mean), of g * (residual - residual_mean).
  double* sums;
  void* workspace;  // (3, period) of the computing type
};

struct BnStatsBackwardArgs {
  const void* dz;
  const void* z;
  void* dzt;
  const void* mean;
  const void* constant;  // dmean / n
  const void* slope;     // 2 * dvar / n
  int64_t period;
  bool stream;  // whether dzt is written past the caches
};

// (n, ih, iw, ci) -> (n, oh, ow, co), not grouped.
struct ConvGeometry {
  int64_t n, ih, iw, ci, oh, ow, co, kh, kw;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct GatherArgs {
  ConvGeometry geometry;
  const float* input;
  // Prologue relu((input - mean) * scale + bias), or null.
  const float* mean;
  const float* scale;
  const float* bias;
};

// Output pixels [begin, end): for each, the inputs (kh, kw, ci) that it is made of, 0 outside.
using ConvGatherFn = void (*)(const GatherArgs&, int64_t begin, int64_t end, float* columns);

// The reverse: adds the columns of output pixels [begin, end) to the inputs they are made of.
using ConvScatterAddFn = void (*)(const ConvGeometry&, int64_t begin, int64_t end,
                                  const float* columns, float* input);

// Elements [begin, end) of dense images; begin is a multiple of the period.
using AddReluFn = void (*)(const void* input, const void* residual, void* y, bool stream,
                           int64_t begin, int64_t end);
using AddReluBackwardFn = void (*)(const void* dy, const void* y, void* dinput, bool stream,
                                   int64_t begin, int64_t end);
using BnAddReluFn = void (*)(const BnAddReluArgs&, int64_t begin, int64_t end);
using BnAddReluBackwardFn = void (*)(const BnAddReluBackwardArgs&, int64_t begin, int64_t end);
using BnStatsBackwardFn = void (*)(const BnStatsBackwardArgs&, int64_t begin, int64_t end);

struct KernelTable {
  int vector_bytes;
  AddReluFn add_relu[kDTypes];
  AddReluBackwardFn add_relu_backward[kDTypes];
  BnAddReluFn bn_add_relu[kDTypes][kResiduals][2];  // [dtype][residual][relu]
  BnAddReluBackwardFn bn_add_relu_backward[kDTypes][kResiduals][2];
  BnAddReluBackwardFn prologue_backward[kDTypes];  // Mask::affine, Residual::none
  BnStatsBackwardFn bn_stats_backward[kDTypes];
  MaxPoolFn max_pool2d[kDTypes][2];  // [dtype][with a prologue]
  MaxPoolBackwardFn max_pool2d_backward[kDTypes][2];
  AvgPoolFn avg_pool[kDTypes];
  LinearFn linear[kDTypes];
  ConvGatherFn conv_gather;
  ConvScatterAddFn conv_scatter_add;

  int conv_rows, conv_columns;      // of the register tile: output pixels, output channels
  ConvBlockFn conv_block[kDTypes];  // none for float64
  ConvPackFn conv_pack;
  ConvFoldFn conv_fold;
  // [stride - 1][tiles of 4 or of 2 pixels]; none for float64
  WinogradBlockFn winograd_block[2][2][kDTypes];
  ConvPackFn winograd_pack[2][2];
  WinogradGradientFn winograd_gradient[kDTypes];  // none for float64
  WinogradGradientEndFn winograd_gradient_end;
  StemBlockFn stem_block[kDTypes];  // none for float64
  ConvPackFn stem_pack;
  ChannelSumsFn channel_sums[kDTypes];

  AmxBlockFn amx_block[kDTypes];  // none for float64, or without a matrix unit
  AmxBlockFn digits_block;        // float32's with DigitWeights
  ConvPackFn amx_pack[kDTypes];   // into panels of amx_packed_panel_floats()
  // None for float16 and float64, or without a matrix unit.
  AmxGradientFn amx_gradient[kDTypes];
  AmxGradientEndFn amx_gradient_end;
  WinogradBlockFn winograd_amx_block[2][kDTypes];  // without a stride; none without a matrix unit
  ConvPackFn winograd_amx_pack[2];
};

namespace baseline {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace amx {
extern const KernelTable table;
}

// The table of current_isa().
const KernelTable& kernels();

}  // namespace fastres::cpu
