// The interface between winograd.cpp and winograd_kernel.inl: Winograd's minimal filtering of 3x3
// convolutions without a stride, F(4,3) and F(2,3), after Lavin and Gray (2016, arXiv:1509.09308),
// and with stride 2.
//
// An output tile of O x O pixels comes from P x P input pixels by P * P products instead of 9 * O *
// O: the patch and the kernel are transformed, at each of the P * P positions the tiles' channels
// are multiplied as matrices, and the products are transformed back.
//
// With stride 2 an output is g0 and g2 times even inputs, F(O,2) of every other pixel, plus g1
// times an odd one: a line's positions are the O + 1 of F(O,2) and then the O odd pixels as they
// are. In both directions, that is 81 products instead of 144 for O = 4. All odd pixels share g1,
// so that with either stride there are (O + 2) * (O + 2) different transformed kernels.
#pragma once

#include <cstdint>

#include "conv_amx_kernel.h"
#include "conv_kernel.h"

namespace fastres::cpu {

// Floats from one position to the next in a buffer whose positions hold `floats` each: an odd
// number of cache lines, or all the positions would share a few sets of the cache.
constexpr int64_t winograd_stride(int64_t floats) {
  const int64_t lines = (floats + 15) / 16;
  return (lines + 1 - lines % 2) * 16;
}

// Pixels across the patch of a tile of `tile` pixels, and positions.
constexpr int winograd_patch(int tile, int stride) { return stride * (tile - 1) + 3; }

// Packed kernels are [panels][(O + 2) * (O + 2)][ci][16], the kernels winograd_stride() apart.
constexpr int64_t winograd_panel_floats(int tile, int64_t ci) {
  return (tile + 2) * (tile + 2) * winograd_stride(ci * kConvPanel);
}

// Tiles [tile0, tile1) of all the images' tiles in their order, panels [panel0, panel1).
struct WinogradBlock {
  int64_t tile0, tile1;
  int64_t panel0, panel1;
};

// Panels whose products are held at a time, of all the tiles of a block.
inline constexpr int64_t kWinogradPanels = 4;

struct WinogradScratch {
  // P * P * winograd_stride(tiles * winograd_row(ci)), or winograd_amx_stride(tiles, ci).
  float* patches;
  float* products;  // P * P * winograd_stride(tiles * winograd_row(kWinogradPanels * kConvPanel))
};

// Floats from one tile to the next.
constexpr int64_t winograd_row(int64_t channels) { return channels + 16; }

// With AMX, a block's tiles are groups of kAmxRows; patches and products have room for whole ones.
// Patches are [position][group][step][part][tile][32 channels] in bfloat16 parts, the positions so
// many floats apart; args.weight is the kernels' parts, [position][panel][amx_panel_floats(1, ci)].
constexpr int64_t winograd_amx_groups(int64_t tiles) { return (tiles + kAmxRows - 1) / kAmxRows; }

constexpr int64_t winograd_amx_stride(int64_t tiles, int64_t ci) {
  return winograd_stride(winograd_amx_groups(tiles) * amx_panel_floats(1, ci));
}

// Computes a block, whose args are a convolution's with ci and co multiples of kConvPanel; adds
// sums as ConvBlockFn does. False where a result is not finite: then an infinity or a NaN may have
// spread to pixels of its tile that the convolution's own sum leaves alone.
using WinogradBlockFn = bool (*)(const ConvArgs&, const WinogradBlock&, const WinogradScratch&,
                                 double* sums);

// The gradient of the kernels, the exact transpose of the forward F(4,3): patches of the input and
// tiles of the output's gradient are transformed, multiplied over the tiles at each position, and
// the sums are transformed back to 3x3.
struct WinogradGradientArgs {
  ConvArgs conv;         // its input, prologue, padding and sizes; ci is all of the channels
  const void* gradient;  // dense (n, oh, ow, co)
};

// Adds the tiles [tile0, tile1) for input channels [ci0, ci1) and output channels [co0, co1),
// multiples of kConvPanel, kWinogradGradientChannels of each at most.
struct WinogradGradientBlock {
  int64_t tile0, tile1, ci0, ci1, co0, co1;
};

inline constexpr int kWinogradGradientChannels = 64;
inline constexpr int64_t kWinogradGradientTiles = 48;  // transformed at a time
// Floats of [36 positions][tiles or input channels][winograd_row(output channels)].
inline constexpr int64_t kWinogradGradientStride =
    winograd_stride(kWinogradGradientTiles * winograd_row(kWinogradGradientChannels));
inline constexpr int64_t kWinogradSumStride =
    winograd_stride(kWinogradGradientChannels * winograd_row(kWinogradGradientChannels));
inline constexpr int64_t kWinogradSumFloats = 36 * kWinogradSumStride;
inline constexpr int64_t kWinogradGradientScratch = 2 * 36 * kWinogradGradientStride;

using WinogradGradientFn = void (*)(const WinogradGradientArgs&, const WinogradGradientBlock&,
                                    float* scratch, float* sums);

// Transforms the total of `count` sums, kWinogradSumFloats apart, into the block's part of
// `gradient`. False where a result is not finite.
struct WinogradKernelGradient {
  float* data;
  int64_t stride_o, stride_i, stride_h, stride_w;
};
using WinogradGradientEndFn = bool (*)(const WinogradGradientBlock&, const float* sums, int count,
                                       const WinogradKernelGradient&);

}  // namespace fastres::cpu
