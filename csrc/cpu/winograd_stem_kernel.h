// The interface between winograd_stem.cpp and winograd_stem_kernel.inl: Winograd's minimal
// filtering along the lines of convolutions 7 pixels wide with a stride of 2, as the ImageNet
// ResNets' first one is. Down the kernel's rows the sums stay direct.
//
// The even and the odd taps are kernels of 4 and 3 taps without a stride, over the even and the odd
// pixels of a line: F(4,4), which meets at 7 points, and F(4,3) at 6 of them. Products at the same
// point are transformed back by the same numbers, so they are added up first. For each row of the
// kernel and input channel, 4 output pixels take 7 + 6 = 13 products instead of 28.
#pragma once

#include <cstdint>

#include "conv_kernel.h"

namespace fastres::cpu {

inline constexpr int64_t kStemTaps = 7;      // across
inline constexpr int64_t kStemChannels = 4;  // of the input, at most
inline constexpr int kStemTile = 4;          // output pixels, one after the other
inline constexpr int kStemPositions = 7;
inline constexpr int64_t kStemProducts = 13;

// Packed kernels are [panels][position][even, odd taps][kh][ci][16], without odd taps at the last
// position.
constexpr int64_t stem_panel_floats(int64_t kh, int64_t ci) {
  return kStemProducts * kh * ci * kConvPanel;
}

// Output rows [h0, h1) and tiles [tile0, tile1) of each row of image n. `origin` is the output
// element that args.output points to, 0 where there is a residual.
struct StemBlock {
  int64_t n, h0, h1, tile0, tile1, origin;
};

// A block's scratch: a row of its input; its pixels as columns, [pixel][row][channel]; and its
// transformed tiles, [tile][position][even, odd pixels][row][channel]. Sizes in floats.
struct StemLayout {
  int64_t rows, pixels, tiles;  // of the input, across
  int64_t column;               // a pixel's rows, to whole vectors
  int64_t tile;                 // an odd number of cache lines

  constexpr StemLayout(int64_t height, int64_t tiles, int64_t kh, int64_t stride_h, int64_t ci)
      : rows((height - 1) * stride_h + kh),
        pixels((tiles - 1) * 2 * kStemTile + 2 * (kStemTile - 1) + kStemTaps),
        tiles(tiles),
        column(lines((rows - 1) * ci + kStemChannels)),
        tile(kStemPositions * 2 * column + 16) {}

  constexpr int64_t row_floats(int64_t ci) const { return lines(pixels * ci + kStemChannels); }
  constexpr int64_t columns_floats() const { return pixels * column; }
  constexpr int64_t floats(int64_t ci) const {
    return row_floats(ci) + columns_floats() + tiles * tile;
  }

 private:
  static constexpr int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }
};

// Computes a block, whose args are a convolution's with co a multiple of kConvPanel; adds sums and
// returns as WinogradBlockFn does.
using StemBlockFn = bool (*)(const ConvArgs&, const StemBlock&, float* scratch, double* sums);

}  // namespace fastres::cpu
