// 1x1 convolutions by Strassen's multiplication: with pixels a1 and a2 and kernels b1 and b2 of two
// halves of the output channels, in halves of the input channels,
//   m0 = (a11 + a22) (b11 + b22)    m3 = a22 (b21 - b11)    m5 = (a21 - a11) (b11 + b12)
//   m1 = (a21 + a22) b11            m4 = (a11 + a12) b22    m6 = (a12 - a22) (b21 + b22)
//   m2 = a11 (b12 - b22)
//   c11 = m0 + m3 - m4 + m6    c12 = m2 + m4    c21 = m1 + m3    c22 = m0 - m1 + m2 + m5
#include "strassen_kernel.h"

namespace fastres::cpu::FASTRES_ISA {

// The sums of products lose more than the products, which shorter stretches make up for.
inline constexpr int64_t kStrassenStretch = 128;

// A pair of pixels: where the first is among all output pixels, and how many its image has from
// there on.
struct StrassenPair {
  int64_t pixel, left;

  FASTRES_INLINE int count() const { return left > 1 ? 2 : 1; }

  FASTRES_INLINE void next(const ConvArgs& args) {
    const int both = count();
    pixel += both;
    left -= both;
    if (left == 0) left = args.oh * args.ow;
  }
};

FASTRES_INLINE StrassenPair strassen_pair(const ConvArgs& args, int64_t pair) {
  const int64_t pixels = args.oh * args.ow, pairs = strassen_pairs(pixels);
  const int64_t before = pair % pairs * 2;
  return {.pixel = pair / pairs * pixels + before, .left = pixels - before};
}

// The sums of the block's pixels, sums[product][pair][channel].
template <typename T, bool kPrologue>
void strassen_sums(const ConvArgs& args, const StrassenBlock& block, float* sums) {
  const int64_t half = args.ci / 2, stride = strassen_stride(block.pair1 - block.pair0, half);
  StrassenPair pair = strassen_pair(args, block.pair0);
  int64_t w = pair.pixel % args.ow, h = pair.pixel / args.ow % args.oh;
  int64_t n = pair.pixel / args.ow / args.oh;
  const auto next_pixel = [&]() FASTRES_LAMBDA_INLINE {
    const T* pixel = static_cast<const T*>(args.input) + n * args.input_stride_n +
                     h * args.stride_h * args.input_stride_h +
                     w * args.stride_w * args.input_stride_w;
    if (++w == args.ow) {
      w = 0;
      if (++h == args.oh) {
        h = 0;
        ++n;
      }
    }
    return pixel;
  };
  for (int64_t i = block.pair0; i < block.pair1; ++i, sums += strassen_row(half)) {
    const T* first = next_pixel();
    const T* second = pair.count() == 2 ? next_pixel() : first;
    pair.next(args);
    for (int64_t c = 0; c < half; c += kFloatLanes) {
      const auto get = [&](const T* pixel, int64_t channel) FASTRES_LAMBDA_INLINE {
        Floats x = load(pixel + channel);
        if (kPrologue) {
          x = relu((x - load(args.in_mean + channel)) * load(args.in_scale + channel) +
                   load(args.in_bias + channel));
        }
        return x;
      };
      const Floats a11 = get(first, c), a12 = get(first, half + c);
      const Floats a21 = get(second, c), a22 = get(second, half + c);
      const Floats parts[kStrassenProducts] = {a11 + a22, a21 + a22, a11,      a22,
                                               a11 + a12, a21 - a11, a12 - a22};
#pragma GCC unroll 7
      for (int p = 0; p < kStrassenProducts; ++p) store(sums + p * stride + c, parts[p]);
    }
  }
}

// From a product of a register tile's pairs to the next one.
inline constexpr int64_t kStrassenTile = kConvRows * kStrassenHalf;

// The results of `count` pairs for a group of channels, from products[product][pair][channel],
// after the epilogue. Returns as winograd_store() does.
template <typename T, bool kAffine, bool kResidual, bool kRelu>
Floats strassen_store(const ConvArgs& args, StrassenPair pair, int count, int64_t channel,
                      const float* factors, const float* products, double* sums) {
  Floats bad = {};
  alignas(64) float pixels[2 * kConvRows * kStrassenGroup];
  int stored = 0;
  for (int m = 0; m < count; ++m, products += kStrassenHalf) {
    const int64_t at = pair.pixel * args.co + channel;
    for (int64_t c = 0; c < kStrassenHalf; c += kFloatLanes) {
      Floats x[kStrassenProducts];
#pragma GCC unroll 7
      for (int p = 0; p < kStrassenProducts; ++p) x[p] = load(products + p * kStrassenTile + c);
      const Floats results[2][2] = {{x[0] + x[3] - x[4] + x[6], x[2] + x[4]},
                                    {x[1] + x[3], x[0] - x[1] + x[2] + x[5]}};
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t column = half * kStrassenHalf + c;
        const Floats factor = load(factors + column);
        const auto put = [&](int i) FASTRES_LAMBDA_INLINE {
          Floats v = results[i][half] * factor;
          bad += v * 0.0f;
          if (sums != nullptr) store(pixels + (stored + i) * kStrassenGroup + column, v);
          const int64_t element = at + i * args.co + column;
          if (kAffine) {
            v = v * load(args.scale + channel + column) + load(args.shift + channel + column);
          }
          if (kResidual) v += load(static_cast<const T*>(args.residual) + element);
          if (kRelu) v = relu(v);
          store(static_cast<T*>(args.output) + element, v, kVecIsLine && args.stream);
        };
        put(0);
        if (pair.count() == 2) put(1);
      }
    }
    stored += pair.count();
    pair.next(args);
  }
  for (int64_t c = 0; sums != nullptr && c < kStrassenGroup; c += kFloatLanes) {
    conv_add_sums(pixels + c, stored, kStrassenGroup, sums + channel + c, args.co);
  }
  return bad;
}

template <typename T>
FASTRES_INLINE auto strassen_store_of(const ConvArgs& args) {
  if (args.scale == nullptr) return strassen_store<T, false, false, false>;
  if (args.residual == nullptr) {
    return args.relu ? strassen_store<T, true, false, true> : strassen_store<T, true, false, false>;
  }
  return args.relu ? strassen_store<T, true, true, true> : strassen_store<T, true, true, false>;
}

// Asks for a share of the pairs' residual before product `p`: the memory has the time of all the
// products to bring what the store will add.
template <typename T>
FASTRES_INLINE void strassen_prefetch(const ConvArgs& args, StrassenPair pair, int count,
                                      int64_t channel, int p) {
  constexpr int kLine = 64 / sizeof(T), kPixelLines = kStrassenGroup / kLine;
  const int first = p == 0 ? 0 : p + 1, end = p + 2;
  for (int m = 0; m < count; ++m, pair.next(args)) {
    const T* residual = static_cast<const T*>(args.residual) + pair.pixel * args.co + channel;
    for (int line = first; line < min(end, 2 * kPixelLines); ++line) {
      __builtin_prefetch(residual + line / kPixelLines * args.co + line % kPixelLines * kLine);
    }
  }
}

template <typename T>
bool strassen_block(const ConvArgs& args, const StrassenBlock& block, float* scratch,
                    double* sums) {
  const int64_t pairs = block.pair1 - block.pair0, half = args.ci / 2;
  const auto add = args.in_mean != nullptr ? strassen_sums<T, true> : strassen_sums<T, false>;
  add(args, block, scratch);
  const int64_t stride = strassen_stride(pairs, half), row = strassen_row(half);
  const int64_t group_floats = strassen_group_floats(args.ci), panel_floats = half * kConvPanel;
  const int64_t vec_stride = kFloatLanes == kConvPanel ? panel_floats : kFloatLanes;
  const int64_t tiles = (pairs + kConvRows - 1) / kConvRows;
  const ConvDepth depth = {1, half, 0, min(half / 2, kStrassenStretch)};
  // The pixels of the next block, if they are next to each other.
  const bool dense = args.input_stride_w == args.ci && args.stride_w == 1;
  const int64_t end = strassen_pair(args, block.pair1).pixel;
  const int64_t left = args.n * args.oh * args.ow - end;
  const int64_t pixels = end - strassen_pair(args, block.pair0).pixel;
  const Prefetch ahead = {
      reinterpret_cast<const char*>(static_cast<const T*>(args.input) + end * args.ci),
      dense ? min(pixels, left) * args.ci * static_cast<int64_t>(sizeof(T)) : 0};
  const int64_t parts = (block.group1 - block.group0) * tiles * kStrassenProducts;
  int64_t part = 0;
  const auto finish = strassen_store_of<T>(args);
  const StrassenPair begin = strassen_pair(args, block.pair0);
  alignas(64) float products[kStrassenProducts * kStrassenTile];
  Floats bad = {};
  for (int64_t group = block.group0; group < block.group1; ++group) {
    const float* kernels = args.weight + group * group_floats;
    const float* factors = kernels + group_floats - kStrassenGroup;
    const int64_t channel = group * kStrassenGroup;
    StrassenPair pair = begin;
    int64_t first = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int height = static_cast<int>(pairs / tiles + (t < pairs % tiles ? 1 : 0));
      const ConvTileFn multiply = conv_tile_of<kConvVecs>(height);
      for (int p = 0; p < kStrassenProducts; ++p) {
        ahead.part(part++, parts);
        if (args.residual != nullptr) strassen_prefetch<T>(args, pair, height, channel, p);
        const float* pointers[kConvRows];
        for (int m = 0; m < height; ++m) pointers[m] = scratch + p * stride + (first + m) * row;
        for (int64_t c = 0; c < kStrassenHalf; c += kConvColumns) {
          const int64_t column = p * kStrassenHalf + c;
          multiply(pointers, depth,
                   kernels + column / kConvPanel * panel_floats + column % kConvPanel, vec_stride,
                   t < tiles - 1 ? 0 : group_floats, products + p * kStrassenTile + c,
                   kStrassenHalf);
        }
      }
      bad += finish(args, pair, height, channel, factors, products, sums);
      for (int m = 0; m < height; ++m) pair.next(args);
      first += height;
    }
  }
  end_stream(args.stream);
  return all_zero(bad);
}

// The power of two that brings x to between 1 and 2, and its inverse; for 0 an inverse of 0, so
// that a channel without kernels comes out as exactly that.
FASTRES_INLINE float strassen_scale(float x, float* inverse) {
  const uint32_t exponent = bit_cast<uint32_t>(x) >> 23;
  const uint32_t e = exponent == 0 || exponent >= 254 ? 127 : exponent;
  *inverse = x == 0.0f ? 0.0f : bit_cast<float>(e << 23);
  return bit_cast<float>((254 - e) << 23);
}

// w.ci is a multiple of kStrassenHalf, w.co of kStrassenGroup. Writes groups [group0, group1).
inline void strassen_pack(const ConvWeight& w, float* packed, int64_t group0, int64_t group1) {
  constexpr int kPanels = kStrassenGroup / kConvPanel;
  const int64_t half = w.ci / 2, panel_floats = half * kConvPanel;
  for (int64_t group = group0; group < group1; ++group) {
    float* out = packed + group * strassen_group_floats(w.ci);
    float* factors = out + strassen_group_floats(w.ci) - kStrassenGroup;
    const float* in = w.data + group * kStrassenGroup * w.stride_o;
    alignas(64) float scales[kStrassenGroup];
    for (int o = 0; o < kStrassenGroup; ++o) {
      // Bits without the sign, which are in the order of the numbers.
      uint32_t largest = 0;
      for (int64_t i = 0; i < w.ci; ++i) {
        const float x = in[o * w.stride_o + i * w.stride_i];
        largest = max(largest, bit_cast<uint32_t>(x) & 0x7fffffff);
      }
      scales[o] = strassen_scale(bit_cast<float>(largest), factors + o);
    }
    for (int64_t i = 0; i < half; i += kConvPanel) {
      // b[half of the input channels][panel][input channel][output channel]
      alignas(64) float b[2][kPanels][kConvPanel * kConvPanel];
      for (int k = 0; k < 2; ++k) {
        for (int panel = 0; panel < kPanels; ++panel) {
          conv_pack_tap(w, in + panel * kConvPanel * w.stride_o + (k * half + i) * w.stride_i, 0,
                        kConvPanel, kConvPanel, b[k][panel]);
        }
      }
      for (int panel = 0; panel < kPanels / 2; ++panel) {
        for (int e = 0; e < kConvPanel * kConvPanel; e += kFloatLanes) {
          const float* scale = scales + panel * kConvPanel + e % kConvPanel;
          const Floats left = load(scale), right = load(scale + kStrassenHalf);
          const Floats b11 = load(b[0][panel] + e) * left, b21 = load(b[1][panel] + e) * left;
          const Floats b12 = load(b[0][panel + kPanels / 2] + e) * right;
          const Floats b22 = load(b[1][panel + kPanels / 2] + e) * right;
          const Floats parts[kStrassenProducts] = {b11 + b22, b11,       b12 - b22, b21 - b11,
                                                   b22,       b11 + b12, b21 + b22};
#pragma GCC unroll 7
          for (int p = 0; p < kStrassenProducts; ++p) {
            store(out + (p * (kPanels / 2) + panel) * panel_floats + i * kConvPanel + e, parts[p]);
          }
        }
      }
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
