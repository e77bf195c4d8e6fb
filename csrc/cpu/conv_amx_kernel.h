// The interface between conv_amx.cpp and conv_amx_kernel.inl: float32 convolutions on the matrix
// unit of Intel's AMX, which multiplies bfloat16 and adds in float32. A float is the sum of three
// bfloat16 parts, high + middle + low; of the nine products of two floats' parts the six largest
// are added up, which leaves out less than 2^-22 of a product. Images of bfloat16 are multiplied as
// they are, by weights of bfloat16.
#pragma once

#include "conv_kernel.h"

namespace fastres::cpu {

// Pixels and output channels of a tile, input channels of a step, and parts of a float.
inline constexpr int kAmxRows = 16, kAmxDepth = 32, kAmxParts = 3;

// Packed weights in digits (conv_digits_kernel.h): how many a weight has, what channels of the
// input are multiplied by before they are digits and what sums of output channels are afterwards,
// padded to whole steps and panels, and the digits.
struct DigitWeights {
  int digits;  // 0: there are none
  const float *input_scale, *output_scale;
  const int8_t* data;
};

// A convolution, or the gradient of one's input: a convolution of the output's gradient with the
// kernels turned.
struct AmxConvArgs {
  ConvArgs conv;
  // With z, laid out as the input, conv's input becomes that of z by a BatchNorm's statistics:
  // input + in_bias + in_scale * (z - in_mean).
  const void* z;
  // Of the output, in elements; `origin` is the one that conv.output points to, 0 where there is a
  // residual or x.
  int64_t output_stride_n, output_stride_h, output_stride_w, origin;
  // With x, laid out as the output, the epilogue is the backward of relu((x - x_mean) * x_scale +
  // x_bias): what is written is the gradient of x, and the sums are, of the gradient g of what the
  // ReLU takes, g and g * (x - x_mean). Vectors are padded to whole panels.
  const void* x;
  const float *x_mean, *x_scale, *x_bias;
  DigitWeights weights;  // in the place of conv.weight
};

// Parts of the numbers that are multiplied, where images are of bfloat16 or not.
constexpr int amx_parts(bool is_bfloat16) { return is_bfloat16 ? 1 : kAmxParts; }

// Floats that a tile's operand of one part takes, and all three parts.
inline constexpr int64_t kAmxTile = 16 * kAmxDepth / 2;
inline constexpr int64_t kAmxStep = kAmxParts * kAmxTile;

// Parts of a pixel's numbers in digits, and channels of a step: as many bytes as otherwise.
inline constexpr int kPixelDigits = 4, kDigitDepth = 64;

constexpr int64_t amx_steps(int64_t channels, int parts = kAmxParts) {
  const int64_t depth = parts == kPixelDigits ? kDigitDepth : kAmxDepth;
  return (channels + depth - 1) / depth;
}

// A panel's weights as they are packed, [stream][step][tap][4 input channels][16 output channels],
// and in parts, [step][tap][part][channel pair][16 output channels][2]. A step comes from all
// streams: the hardware's prefetcher runs a number of lines ahead in each, and so eight times as
// far ahead of the products as it would in one.
inline constexpr int64_t kAmxPackedStep = kAmxDepth * kConvPanel;
inline constexpr int kAmxStreams = 8;
inline constexpr int kAmxStreamDepth = kAmxDepth / kAmxStreams;
inline constexpr int64_t kAmxStreamStep = kAmxPackedStep / kAmxStreams;

// Weights of one part are packed as that: [step][tap][channel pair][16 output channels][2].
constexpr int64_t amx_packed_panel_floats(int64_t taps, int64_t ci, int parts) {
  return taps * amx_steps(ci) * (parts == 1 ? kAmxTile : kAmxPackedStep);
}

constexpr int64_t amx_panel_floats(int64_t taps, int64_t ci, int parts = kAmxParts) {
  return taps * amx_steps(ci) * parts * kAmxTile;
}

// Weights in parts, of so many pairs of panels, stay in the second level cache while pixels pass
// by.
constexpr int64_t amx_group_pairs(int64_t taps, int64_t ci, int parts) {
  const int64_t pairs = 64 * 1024 / (2 * amx_panel_floats(taps, ci, parts));
  return pairs > 1 ? pairs : 1;
}

// Whether a row of the kernel, all its pixels with their few channels, is a step by itself: those
// numbers follow each other in an image.
constexpr bool amx_takes_rows(int64_t ci, int64_t kw) {
  return ci < kAmxRows && kw * ci >= kAmxRows && kw * ci <= kAmxDepth;
}

// Floats of a block's input that stay in a second level cache of 2 MB beside the weights of two
// panels.
inline constexpr int64_t kAmxWindowFloats = 256 * 1024;

// A block's padded input, in bfloat16 parts: [phase][step][part][line][32 channels]. A phase holds
// the pixels whose places in the window are equal modulo the stride; its lines are [row][column]
// [image], so that neighbouring outputs of a row read neighbouring lines, whatever the tap.
// By columns, a phase holds what a column of the kernel is multiplied by, of rows that are equal
// modulo the stride, without padding between them: so all outputs' lines follow each other.
// Where a step is a row of the kernel it is [part][row][column][channel], of one image: the lines
// of neighbouring outputs begin at every stride-th pixel, and overlap.
struct AmxWindow {
  bool by_kernel_rows, by_columns;
  int parts;
  int64_t images, rows, columns;  // of a phase
  int64_t phases, steps;
  int64_t taps, channels;  // of a tap
  int64_t line, row;       // 16-bit numbers from a line to the next, and from a row
  int64_t out_row;         // and from an output row's first line to the next one's

  constexpr AmxWindow(const ConvArgs& args, int64_t images_, int64_t out_rows, int parts_)
      : by_kernel_rows(amx_takes_rows(args.ci, args.kw)),
        by_columns(false),
        parts(parts_),
        images(images_) {
    if (by_kernel_rows) {
      rows = (out_rows - 1) * args.stride_h + args.kh;
      columns = (args.ow + kAmxRows - 1) / kAmxRows * kAmxRows;  // outputs, in whole tiles
      phases = steps = 1;
      taps = args.kh;
      channels = args.kw * args.ci;
      line = args.stride_w * args.ci;
      row = ((columns - 1) * line + 2 * kAmxDepth - 1) / kAmxDepth * kAmxDepth;
      out_row = args.stride_h * row;
    } else {
      rows = ((out_rows - 1) * args.stride_h + args.kh + args.stride_h - 1) / args.stride_h;
      columns = ((args.ow - 1) * args.stride_w + args.kw + args.stride_w - 1) / args.stride_w;
      phases = args.stride_h * args.stride_w;
      steps = amx_steps(args.ci, parts);
      taps = args.kh * args.kw;
      channels = args.ci;
      line = kAmxDepth;
      row = out_row = pitch() * line;
      if (args.kw > 1) {
        AmxWindow other = *this;
        other.by_columns = true;
        other.columns = args.ow;
        other.phases = args.stride_h * args.kw;
        other.row = other.out_row = other.pitch() * line;
        // Filling it takes kw times as many copies, which less than an eighth of the tiles does not
        // repay.
        const bool fewer = 8 * other.tiles(out_rows, args.ow) <= 7 * tiles(out_rows, args.ow);
        // In either form: of the blocks that share a thread's scratch, smaller ones may be in the
        // other.
        const bool fits = other.floats() <= kAmxWindowFloats && floats() <= kAmxWindowFloats;
        if (fits && (fewer || other.last_alone(out_rows, args.ow))) *this = other;
      }
    }
  }

  // Whether the last output would be a tile by itself, and the others are tiles that split weights:
  // then its sum is made of what is split, beside the matrix unit.
  constexpr bool last_alone(int64_t out_rows, int64_t ow) const {
    const int64_t lines = out_rows * ow * images;
    return parts == kAmxParts && !by_kernel_rows && (out_rows == 1 || pitch() == ow * images) &&
           lines % kAmxRows == 1 && lines > kAmxRows && lines < 4 * kAmxRows;
  }

  // Tiles for each row of outputs by itself, and for all their lines from the first to the last.
  constexpr int64_t row_tiles(int64_t ow) const { return (ow * images + kAmxRows - 1) / kAmxRows; }
  constexpr int64_t joint_tiles(int64_t out_rows, int64_t ow) const {
    return ((out_rows - 1) * pitch() + ow * images + kAmxRows - 1) / kAmxRows;
  }
  constexpr int64_t tiles(int64_t out_rows, int64_t ow) const {
    const int64_t apart = out_rows * row_tiles(ow), joint = joint_tiles(out_rows, ow);
    return apart < joint ? apart : joint;
  }

  constexpr int64_t pitch() const { return columns * images; }
  // In floats. The last tile may reach beyond; an odd number of lines keeps parts out of each
  // other's cache sets.
  constexpr int64_t plane() const {
    return ((rows * row / kAmxDepth + kAmxRows) | 1) * (kAmxDepth / 2);
  }
  constexpr int64_t floats() const {
    // A row of floats, before it is split.
    return phases * steps * parts * plane() + (by_kernel_rows ? row : 0);
  }
};

// Upper bound of the tiles of a block.
constexpr int64_t amx_most_tiles(int64_t images, int64_t rows, int64_t ow) {
  return rows * ((ow * images + kAmxRows - 1) / kAmxRows);
}

struct AmxScratch {
  float* window;     // AmxWindow::floats()
  float* weights;    // 2 * amx_group_pairs() * amx_panel_floats(), where they are split
  int64_t* starts;   // amx_most_tiles(): where in a part a tile's first line is, in 16-bit numbers
  int64_t* offsets;  // 16 times as many: where an output pixel is written, or -1
  int64_t* places;   // AmxWindow::taps
  // Of digits: for each of a tile's pixels what its sums are multiplied by, and for each image of
  // the block that and what its numbers are before they are digits.
  float *factors, *image_factors, *image_scales;
};

// Of the block, [w0, w1) must be whole rows. Returns whether all sums were finite; where they were
// not, the output may be wrong.
using AmxBlockFn = bool (*)(const AmxConvArgs&, const ConvBlock&, const AmxScratch&, double* sums);

}  // namespace fastres::cpu
