// The interface between strassen.cpp and strassen_kernel.inl: 1x1 convolutions by Strassen's
// multiplication of matrices (1969, Gaussian Elimination is not Optimal).
//
// Two pixels next to each other by the halves of their channels are 2 x 2 blocks, and so are the
// halves of the input channels by those of 64 output channels. Their product takes 7 products of
// sums of blocks instead of 8. The kernels' sums are made when they are packed.
//
// A block's results share the errors of all that went into its products. So that a channel of small
// kernels is as exact as others, each channel's kernels are packed times a power of two that brings
// the largest to between 1 and 2, and its results are divided by it.
#pragma once

#include <cstdint>

#include "conv_kernel.h"

namespace fastres::cpu {

inline constexpr int kStrassenProducts = 7;
// Output channels of a half, and of a group of both.
inline constexpr int64_t kStrassenHalf = 2 * kConvPanel;
inline constexpr int64_t kStrassenGroup = 2 * kStrassenHalf;

// Packed kernels are [groups][7][2 panels][ci / 2][16], each group followed by what its channels'
// results are multiplied by.
constexpr int64_t strassen_group_floats(int64_t ci) {
  return kStrassenProducts * (ci / 2) * kStrassenHalf + kStrassenGroup;
}

// Pixels in pairs, each image's last one alone where their number is odd.
constexpr int64_t strassen_pairs(int64_t image_pixels) { return (image_pixels + 1) / 2; }

// Pairs [pair0, pair1) of all the images' in their order, groups [group0, group1).
struct StrassenBlock {
  int64_t pair0, pair1;
  int64_t group0, group1;
};

// Floats of a block's pixels' sums, from a pair to the next and from a product to the next: as in
// Winograd's patches, neither share a set of the cache.
constexpr int64_t strassen_row(int64_t half) { return half + 16; }
constexpr int64_t strassen_stride(int64_t pairs, int64_t half) {
  const int64_t lines = (pairs * strassen_row(half) + 15) / 16;
  return (lines + 1 - lines % 2) * 16;
}

// Computes a block, whose args are a 1x1 convolution's without padding, with ci a multiple of
// kStrassenHalf and co of kStrassenGroup; scratch is kStrassenProducts * strassen_stride(pairs,
// ci / 2). Adds sums and returns as WinogradBlockFn does.
using StrassenBlockFn = bool (*)(const ConvArgs&, const StrassenBlock&, float* scratch,
                                 double* sums);

}  // namespace fastres::cpu
