// Convolution as an implicit GEMM on AMX tiles: two tiles of 16 output pixels by two of 16 output
// channels at a time, over all taps and input channels.

namespace fastres::cpu::FASTRES_ISA {

struct AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// x with all but the highest 8 bits of its mantissa cleared: a bfloat16.
FASTRES_INLINE Floats amx_high(Floats x) {
  return bit_cast<Floats>(bit_cast<Uints>(x) & 0xffff0000);
}

// x rounded to a bfloat16. Parts that are cut off have x's sign, and so do all the products that
// are left out: one operand's parts are rounded, or errors would add up from layer to layer. A
// convolution's are the pixels', which are split once a block, while the weights may be split for
// every few pixels.
FASTRES_INLINE Floats amx_rounded(Floats x) {
  return bit_cast<Floats>((bit_cast<Uints>(x) + 0x8000) & 0xffff0000);
}

// Two vectors cut off to bfloat16, the first in the lower half of each pair.
FASTRES_INLINE __m512i amx_pair(Floats first, Floats second) {
  const __m512i upper = _mm512_maskz_srli_epi32(0xffff, bit_cast<__m512i>(first), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, upper, bit_cast<__m512i>(second));
}

// Two vectors rounded to nearest even to bfloat16, one after the other: the processor takes
// subnormal numbers for zeros here, as it does in products.
FASTRES_INLINE __m512i amx_narrowed(Floats first, Floats second) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// The same, the first in the lower half of each pair.
FASTRES_INLINE __m512i amx_rounded_pairs(Floats first, Floats second) {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(0xffffffff, _mm512_load_si512(order),
                                        amx_narrowed(first, second));
}

// The three parts of pairs, each `part` numbers after the other.
template <bool kRounded>
FASTRES_INLINE void amx_split_pairs(uint16_t* out, int64_t part, Floats first, Floats second) {
#pragma GCC unroll 3
  for (int i = 0; i < kAmxParts; ++i, out += part) {
    const Floats a = kRounded ? amx_rounded(first) : first;
    const Floats b = kRounded ? amx_rounded(second) : second;
    _mm512_store_si512(out, amx_pair(a, b));
    first -= amx_high(a);
    second -= amx_high(b);
  }
}

// The 32 bfloat16 of two vectors that hold nothing else.
FASTRES_INLINE void amx_store(float* to, Floats first, Floats second) {
  alignas(64) static constexpr uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                   23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                   45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i words = _mm512_permutex2var_epi16(bit_cast<__m512i>(first), _mm512_load_si512(odd),
                                                  bit_cast<__m512i>(second));
  _mm512_store_si512(to, words);
}

// The parts of a storage type's numbers.
template <typename T>
inline constexpr int kAmxPartsOf = amx_parts(false);
template <>
inline constexpr int kAmxPartsOf<bfloat16> = amx_parts(true);

// The one part or the three of 32 channels, each `plane` floats after the other.
template <int kParts>
FASTRES_INLINE void amx_split(Floats a, Floats b, float* to, int64_t plane) {
  if constexpr (kParts == 1) {
    _mm512_store_si512(to, amx_narrowed(a, b));
    return;
  }
  const Floats high_a = amx_rounded(a), high_b = amx_rounded(b);
  const Floats rest_a = a - high_a, rest_b = b - high_b;
  const Floats middle_a = amx_rounded(rest_a), middle_b = amx_rounded(rest_b);
  amx_store(to, high_a, high_b);
  amx_store(to + plane, middle_a, middle_b);
  amx_store(to + 2 * plane, rest_a - middle_a, rest_b - middle_b);
}

// What is done to the input as it is loaded: nothing, the prologue, or AmxConvArgs's z.
enum class AmxLoad { plain, prologue, gradient };

// A pixel's channels into its line of every step and part.
template <typename T, AmxLoad kLoad>
FASTRES_INLINE void amx_fill_pixel(const ConvArgs& args, const T* in, const T* z, float* to,
                                   int64_t plane) {
  const auto loaded = [&](int64_t c, auto load_at) FASTRES_LAMBDA_INLINE {
    const Floats x = load_at(in + c);
    if constexpr (kLoad == AmxLoad::plain) return x;
    const Floats mean = load(args.in_mean + c), scale = load(args.in_scale + c);
    const Floats bias = load(args.in_bias + c);
    if constexpr (kLoad == AmxLoad::prologue) return relu((x - mean) * scale + bias);
    return x + (bias + scale * (load_at(z + c) - mean));
  };
  constexpr int kParts = kAmxPartsOf<T>;
  const auto whole = [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); };
  int64_t c = 0;
  for (; c + kAmxDepth <= args.ci; c += kAmxDepth, to += kParts * plane) {
    if constexpr (kParts == 1 && kLoad == AmxLoad::plain) {
      __builtin_memcpy(to, in + c, kAmxDepth * sizeof(T));
    } else {
      amx_split<kParts>(loaded(c, whole), loaded(c + kFloatLanes, whole), to, plane);
    }
  }
  if (c == args.ci) return;
  Floats x[2] = {};
  for (int v = 0; v < 2 && c < args.ci; ++v, c += kFloatLanes) {
    const int rest = static_cast<int>(min<int64_t>(args.ci - c, kFloatLanes));
    // The vectors are padded with zeros, and give zeros there.
    x[v] = rest == kFloatLanes ? loaded(c, whole)
                               : loaded(c, [rest](const auto* p) FASTRES_LAMBDA_INLINE {
                                   return load_partial(p, rest);
                                 });
  }
  amx_split<kParts>(x[0], x[1], to, plane);
}

// `fill(image, at, to)` puts the channels of a pixel, element `at` of the input, into its line of
// every step and part.
template <typename Fill>
FASTRES_INLINE void amx_fill_window(const ConvArgs& args, const ConvBlock& block,
                                    const AmxWindow& window, float* to, const Fill& fill) {
  constexpr int64_t line = kAmxDepth / 2;
  const int64_t plane = window.plane(), parts = window.steps * window.parts;
  const int64_t h0 = block.h0 * args.stride_h - args.pad_h;
  const int64_t height = (block.h1 - block.h0 - 1) * args.stride_h + args.kh;
  const int64_t width = (args.ow - 1) * args.stride_w + args.kw;
  for (int64_t r = 0; r < height; ++r) {
    const int64_t h = h0 + r;
    float* line_of_row = to + r % args.stride_h * args.stride_w * parts * plane +
                         r / args.stride_h * window.pitch() * line;
    for (int64_t n = 0; n < window.images; ++n) {
      const int64_t row = (block.n0 + n) * args.input_stride_n + h * args.input_stride_h;
      for (int64_t phase = 0; phase < args.stride_w; ++phase) {
        float* pixel = line_of_row + phase * parts * plane + n * line;
        for (int64_t c = phase; c < width; c += args.stride_w, pixel += window.images * line) {
          const int64_t w = c - args.pad_w;
          if (h < 0 || h >= args.ih || w < 0 || w >= args.iw) {
            for (int64_t p = 0; p < parts; ++p) conv_zero(pixel + p * plane, line);
          } else {
            fill(n, row + w * args.input_stride_w, pixel);
          }
        }
      }
    }
  }
}

// As amx_fill_window, by columns.
template <typename Fill>
FASTRES_INLINE void amx_fill_columns(const ConvArgs& args, const ConvBlock& block,
                                     const AmxWindow& window, float* to, const Fill& fill) {
  constexpr int64_t line = kAmxDepth / 2;
  const int64_t plane = window.plane(), parts = window.steps * window.parts;
  const int64_t height = (block.h1 - block.h0 - 1) * args.stride_h + args.kh;
  const int64_t width = (args.ow - 1) * args.stride_w + args.kw;
  for (int64_t r = 0; r < height; ++r) {
    const int64_t h = block.h0 * args.stride_h - args.pad_h + r;
    float* const line_of_row = to + r % args.stride_h * args.kw * parts * plane +
                               r / args.stride_h * window.pitch() * line;
    for (int64_t n = 0; n < window.images; ++n) {
      const int64_t row = (block.n0 + n) * args.input_stride_n + h * args.input_stride_h;
      // Where the padded input's column c is for column v of the kernel, if an output reads it
      // there.
      const auto place = [&](int64_t c, int64_t v) FASTRES_LAMBDA_INLINE {
        const int64_t out = (c - v) / args.stride_w;
        return c < v || (c - v) % args.stride_w != 0 || out >= args.ow
                   ? nullptr
                   : line_of_row + v * parts * plane + (out * window.images + n) * line;
      };
      for (int64_t c = 0; c < width; ++c) {
        const int64_t w = c - args.pad_w;
        const bool inside = h >= 0 && h < args.ih && w >= 0 && w < args.iw;
        const float* filled = nullptr;
        for (int64_t v = 0; v < args.kw; ++v) {
          float* const pixel = place(c, v);
          if (pixel == nullptr) continue;
          if (!inside) {
            for (int64_t p = 0; p < parts; ++p) conv_zero(pixel + p * plane, line);
          } else if (filled == nullptr) {
            fill(n, row + w * args.input_stride_w, pixel);
            filled = pixel;
          } else {
            for (int64_t p = 0; p < parts; ++p) {
              store(pixel + p * plane, load(filled + p * plane));
            }
          }
        }
      }
    }
  }
}

// The window of numbers in parts, in the form that it has.
template <typename T, AmxLoad kLoad>
void amx_fill(const AmxConvArgs& all, const ConvBlock& block, const AmxWindow& window, float* to) {
  const auto fill = [&](int64_t, int64_t at, float* pixel) FASTRES_LAMBDA_INLINE {
    amx_fill_pixel<T, kLoad>(all.conv, static_cast<const T*>(all.conv.input) + at,
                             static_cast<const T*>(all.z) + (all.z == nullptr ? 0 : at), pixel,
                             window.plane());
  };
  if (window.by_columns) {
    amx_fill_columns(all.conv, block, window, to, fill);
  } else {
    amx_fill_window(all.conv, block, window, to, fill);
  }
}

// As amx_fill_window, where a step is a row of the kernel. The rest of a row's last step is
// multiplied by zeros.
template <typename T>
void amx_fill_rows(const ConvArgs& args, const ConvBlock& block, const AmxWindow& window,
                   float* to) {
  const int64_t plane = window.plane();
  float* const row = to + kAmxPartsOf<T> * plane;
  const int64_t first = min(args.pad_w * args.ci, window.row);
  const int64_t pixels = min(args.iw, (window.row - first) / args.ci);
  conv_zero(row, window.row);
  const int64_t h0 = block.h0 * args.stride_h - args.pad_h;
  const int64_t rows = (block.h1 - block.h0 - 1) * args.stride_h + args.kh;
  for (int64_t r = 0; r < rows; ++r, to += window.row / 2) {
    const int64_t h = h0 + r;
    if (h < 0 || h >= args.ih) {
      for (int p = 0; p < kAmxPartsOf<T>; ++p) conv_zero(to + p * plane, window.row / 2);
      continue;
    }
    const T* in = static_cast<const T*>(args.input) + block.n0 * args.input_stride_n +
                  h * args.input_stride_h;
    if constexpr (kAmxPartsOf<T> == 1) {
      if (args.in_mean == nullptr && args.input_stride_w == args.ci) {
        conv_zero(to, window.row / 2);
        __builtin_memcpy(reinterpret_cast<T*>(to) + first, in, pixels * args.ci * sizeof(T));
        continue;
      }
    }
    float* numbers = row + first;
    if (args.in_mean == nullptr && args.input_stride_w == args.ci) {
      int64_t i = 0;
      for (; i + kFloatLanes <= pixels * args.ci; i += kFloatLanes)
        store(numbers + i, load(in + i));
      const int rest = static_cast<int>(pixels * args.ci - i);
      if (rest > 0) store_partial(numbers + i, load_partial(in + i, rest), rest);
    } else {
      for (int64_t w = 0; w < pixels; ++w, in += args.input_stride_w, numbers += args.ci) {
        const int channels = static_cast<int>(args.ci);
        Floats x = load_partial(in, channels);
        if (args.in_mean != nullptr) {
          // The vectors are padded to whole panels.
          x = relu((x - load(args.in_mean)) * load(args.in_scale) + load(args.in_bias));
        }
        store_partial(numbers, x, channels);
      }
    }
    for (int64_t i = 0; i < window.row; i += kAmxDepth) {
      amx_split<kAmxPartsOf<T>>(load(row + i), load(row + i + kFloatLanes), to + i / 2, plane);
    }
  }
}

// What the sums of a tile run over: every tap of a step, then the next step, so that the lines that
// taps share stay in the first level cache.
struct AmxDepth {
  int64_t steps, taps;
  const int64_t* places;  // of each tap's first line in the window, in 16-bit numbers
  int64_t line, step;     // in the window, 16-bit numbers from one to the next
  int64_t plane;          // of a part, in floats
  int64_t panel_parts;    // floats from a panel's parts to the next panel's
};

// A pixel whose sums are made by multiply-adds, of 16 output channels: its numbers in a step, and
// its sums, several since an addition waits for the one before.
struct AmxPixel {
  static constexpr int kSums = 4;
  alignas(64) float numbers[kAmxDepth];
  Floats sums[kSums];

  // The numbers whose parts are at `line` and every `plane` floats on.
  FASTRES_INLINE void gather(const uint16_t* line, int64_t plane) {
    for (int v = 0; v < kAmxDepth; v += kFloatLanes) {
      Floats x = {};
#pragma GCC unroll 3
      for (int part = kAmxParts - 1; part >= 0; --part) {
        x += load(reinterpret_cast<const bfloat16*>(line + 2 * part * plane + v));
      }
      store(numbers + v, x);
    }
  }

  FASTRES_INLINE void add(int pair, Floats even, Floats odd) {
    Floats& sum = sums[pair % kSums];
    sum += even * splat(numbers[2 * pair]);
    sum += odd * splat(numbers[2 * pair + 1]);
  }
};

// Splits pairs of input channels of 16 output channels each, which are pairs `first` and so on of
// `pixel`, if there is one.
FASTRES_INLINE void amx_split_weights(const float* in, int pairs, float* to, AmxPixel* pixel,
                                      int first) {
  for (int p = 0; p < pairs; ++p) {
    const Floats even = load(in + 2 * p * kConvPanel), odd = load(in + (2 * p + 1) * kConvPanel);
    amx_split_pairs<false>(reinterpret_cast<uint16_t*>(to + p * kConvPanel), 2 * kAmxTile, even,
                           odd);
    if (pixel != nullptr) pixel->add(first + p, even, odd);
  }
}

// What a processor does while its matrix unit multiplies: the epilogue of the tiles before, a few
// pixels a step, and asking for the next tiles' residual, which comes from memory in an order that
// the hardware's prefetcher does not see through.
struct AmxMeanwhile {
  // Pixels [pixel, pixels) of the tiles before are still to be written.
  void (*write)(AmxMeanwhile& of, int end);
  const AmxConvArgs* all;
  const float* tile;
  const int64_t* offsets;
  int64_t channel;
  int channels, pixel, pixels, pixels_of_step;
  double* sums;
  Floats bad;  // zero, or NaN once a sum was not finite

  const char* residual;  // null: none
  int64_t bytes;         // of a number
  const int64_t *ahead, *ahead_end;
  int64_t ahead_of_step;

  FASTRES_INLINE void step() {
    if (pixel < pixels) write(*this, min(pixel + pixels_of_step, pixels));
    for (int64_t i = 0; i < ahead_of_step && ahead != ahead_end; ++i, ++ahead) {
      const char* line = residual + *ahead * bytes;
      __builtin_prefetch(line, 0, 2);
      if (kConvColumns * bytes > 64) __builtin_prefetch(line + 64, 0, 2);
    }
  }

  FASTRES_INLINE void finish() {
    if (pixel < pixels) write(*this, pixels);
  }
};

// The sums of R tiles of pixels by C of channels, tile after tile of a pixel's channels.
template <int R, int C>
FASTRES_INLINE void amx_store_tiles(float* out, int64_t row) {
  _tile_stored(0, out, row * 4);
  if constexpr (C == 1) {
    if (R > 1) _tile_stored(1, out + kAmxRows * row, row * 4);
    if (R > 2) _tile_stored(2, out + 2 * kAmxRows * row, row * 4);
    if (R > 3) _tile_stored(3, out + 3 * kAmxRows * row, row * 4);
  } else {
    _tile_stored(1, out + kAmxRows, row * 4);
    if (R > 1) _tile_stored(2, out + kAmxRows * row, row * 4);
    if (R > 1) _tile_stored(3, out + kAmxRows * row + kAmxRows, row * 4);
  }
}

// Sums of R tiles of pixels by C of channels into `out`, `row` floats a pixel. `parts` are the
// weights' parts; with kSplit they are made on the way from the packed `weight`, a step ahead of
// their use, and are kept, all or with `ring` the last two steps'. The matrix unit hides what that
// takes where four tiles of pixels share the weights. With kPixel the first pixel of one more tile
// is added up on the way, too.
template <int R, int C, bool kSplit, bool kPixel = false>
__attribute__((noinline)) void amx_tiles(const AmxDepth& d, const float* window,
                                         const int64_t* starts, const float* weight, float* parts,
                                         bool ring, float* out, int64_t row,
                                         AmxMeanwhile& meanwhile) {
  static_assert(C == 1 ? R <= 4 : C == 2 && R <= 2 && !kSplit);
  static_assert(!kPixel || (kSplit && R < 4));
  constexpr int kStride = 64;  // bytes of a tile's row of weights
  // A tile that is stored when none was for a hundred products or more takes the time of 50
  // products (measured on a Xeon of 2.6 GHz with 2 MB of second level cache a core). One that is
  // stored for nothing every second step takes next to none, and keeps the others quick.
  alignas(64) float nothing[kAmxTile];
  _tile_zero(0);
  if (C > 1 || R > 1) _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1) _tile_zero(3);
  int64_t split_steps = 0;
  AmxPixel pixel;
  const uint16_t* pixel_step = reinterpret_cast<const uint16_t*>(window) + (kPixel ? starts[R] : 0);
  int64_t pixel_tap = 0;
  if constexpr (kPixel) {
    for (Floats& sum : pixel.sums) sum = Floats{};
  }
  const auto split = [&](int quarter) FASTRES_LAMBDA_INLINE {
    if (!kSplit || split_steps == d.steps * d.taps) return;
    constexpr int streams = kAmxStreams / 4, pairs = kAmxStreamDepth / 2;
    float* step = parts + (ring ? split_steps % 2 : split_steps) * kAmxStep;
    if (kPixel && quarter == 0) pixel.gather(pixel_step + d.places[pixel_tap], d.plane);
    for (int i = quarter * streams; i < (quarter + 1) * streams; ++i) {
      amx_split_weights(weight + (i * d.steps * d.taps + split_steps) * kAmxStreamStep, pairs,
                        step + i * pairs * kConvPanel, kPixel ? &pixel : nullptr, i * pairs);
    }
    if (quarter == 3) ++split_steps;
    if (kPixel && quarter == 3 && ++pixel_tap == d.taps) {
      pixel_tap = 0;
      pixel_step += d.step;
    }
  };
  for (int quarter = 0; quarter < 4; ++quarter) split(quarter);
  const uint16_t* step = reinterpret_cast<const uint16_t*>(window);
  int64_t current = 0;
  for (int64_t k = 0; k < d.steps; ++k, step += d.step) {
    for (int64_t tap = 0; tap < d.taps; ++tap, ++current) {
      const uint16_t* a = step + d.places[tap];
      const float* w = parts + (ring ? current % 2 : current) * kAmxStep;
      const auto pixels = [&](int r, int64_t part) FASTRES_LAMBDA_INLINE {
        _tile_loadd(4, a + starts[r] + 2 * part * d.plane, 2 * d.line);
        if (r + 1 < R) _tile_loadd(5, a + starts[r + 1] + 2 * part * d.plane, 2 * d.line);
      };
      // The smallest products first; one operand changes from one to the next.
      if constexpr (C == 1) {
        const auto first = [&]() FASTRES_LAMBDA_INLINE { _tile_loadd(6, w, kStride); };
        const auto other = [&](int64_t part) FASTRES_LAMBDA_INLINE {
          _tile_loadd(7, w + part * kAmxTile, kStride);
        };
        const auto by_first = [&]() FASTRES_LAMBDA_INLINE {
          _tile_dpbf16ps(0, 4, 6);
          if (R > 1) _tile_dpbf16ps(1, 5, 6);
        };
        const auto by_other = [&]() FASTRES_LAMBDA_INLINE {
          _tile_dpbf16ps(0, 4, 7);
          if (R > 1) _tile_dpbf16ps(1, 5, 7);
        };
        pixels(0, 2), first(), by_first(), split(0);
        pixels(0, 1), by_first(), other(1), by_other(), split(1);
        pixels(0, 0), by_other(), other(2), by_other(), by_first(), split(2);
        if constexpr (R > 2) {
          const auto by_first_below = [&]() FASTRES_LAMBDA_INLINE {
            _tile_dpbf16ps(2, 4, 6);
            if (R > 3) _tile_dpbf16ps(3, 5, 6);
          };
          const auto by_other_below = [&]() FASTRES_LAMBDA_INLINE {
            _tile_dpbf16ps(2, 4, 7);
            if (R > 3) _tile_dpbf16ps(3, 5, 7);
          };
          pixels(2, 2), by_first_below();
          pixels(2, 1), by_first_below(), other(1), by_other_below();
          pixels(2, 0), by_other_below(), other(2), by_other_below(), by_first_below();
        }
        split(3);
      } else {
        const auto channels = [&](int64_t part) FASTRES_LAMBDA_INLINE {
          _tile_loadd(6, w + part * kAmxTile, kStride);
          _tile_loadd(7, w + d.panel_parts + part * kAmxTile, kStride);
        };
        const auto multiply = [&]() FASTRES_LAMBDA_INLINE {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (R > 1) _tile_dpbf16ps(2, 5, 6);
          if (R > 1) _tile_dpbf16ps(3, 5, 7);
        };
        pixels(0, 2), channels(0), multiply();
        pixels(0, 1), multiply();
        channels(1), multiply();
        pixels(0, 0), multiply();
        channels(2), multiply();
        channels(0), multiply();
      }
      if (current > 0 && current % 2 == 0) _tile_stored(6, nothing, kStride);
      // After the products: what it loads first has just been stored from tiles.
      meanwhile.step();
    }
  }
  amx_store_tiles<R, C>(out, row);
  if constexpr (kPixel) {
    store(out + R * kAmxRows * row,
          (pixel.sums[0] + pixel.sums[1]) + (pixel.sums[2] + pixel.sums[3]));
  }
}

// As amx_tiles, for numbers of one part: the packed `weight` is what is multiplied.
template <int R, int C>
__attribute__((noinline)) void amx_tiles_of_one_part(const AmxDepth& d, const float* window,
                                                     const int64_t* starts, const float* weight,
                                                     float* out, int64_t row,
                                                     AmxMeanwhile& meanwhile) {
  static_assert(R <= 2 && C <= 2);
  constexpr int kStride = 64;
  alignas(64) float nothing[kAmxTile];
  _tile_zero(0);
  if (C > 1 || R > 1) _tile_zero(1);
  if (R > 1) _tile_zero(2);
  if (R > 1) _tile_zero(3);
  const uint16_t* step = reinterpret_cast<const uint16_t*>(window);
  int64_t current = 0;
  for (int64_t k = 0; k < d.steps; ++k, step += d.step) {
    for (int64_t tap = 0; tap < d.taps; ++tap, ++current, weight += kAmxTile) {
      const uint16_t* a = step + d.places[tap];
      _tile_loadd(4, a + starts[0], 2 * d.line);
      _tile_loadd(6, weight, kStride);
      _tile_dpbf16ps(0, 4, 6);
      if (C > 1) _tile_loadd(7, weight + d.panel_parts, kStride);
      if (C > 1) _tile_dpbf16ps(1, 4, 7);
      if (R > 1) _tile_loadd(5, a + starts[1], 2 * d.line);
      if (R > 1 && C == 1) _tile_dpbf16ps(1, 5, 6);
      if (R > 1 && C > 1) _tile_dpbf16ps(2, 5, 6);
      if (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
      if (current % 8 == 7) _tile_stored(6, nothing, kStride);
      meanwhile.step();
    }
  }
  amx_store_tiles<R, C>(out, row);
}

// Where the tiles of a block, of `tile_rows` pixels, start and their pixels are written, and of
// digits their factors; returns the tiles' number.
inline int64_t amx_place_tiles(const AmxConvArgs& all, const ConvBlock& block,
                               const AmxWindow& window, const AmxScratch& scratch,
                               int64_t tile_rows = kAmxRows) {
  const ConvArgs& args = all.conv;
  const int64_t row = args.ow * window.images, rows = block.h1 - block.h0;
  const int64_t row_tiles = window.row_tiles(args.ow), tiles = window.tiles(rows, args.ow);
  const bool by_row = !window.last_alone(rows, args.ow) && tiles == rows * row_tiles;
  int64_t* offset = scratch.offsets;
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t h = by_row ? t / row_tiles : t * tile_rows / window.pitch();
    int64_t place = by_row ? t % row_tiles * tile_rows : t * tile_rows % window.pitch();
    scratch.starts[t] = h * window.out_row + place * window.line;
    for (int m = 0; m < kAmxRows; ++m, ++offset) {
      const bool inside = m < tile_rows && place < row && h < rows;
      const int64_t w = place / window.images, n = place % window.images;
      *offset = inside
                    ? (block.n0 + n) * all.output_stride_n + (block.h0 + h) * all.output_stride_h +
                          w * all.output_stride_w - all.origin
                    : -1;
      if (window.parts == kPixelDigits) {
        scratch.factors[t * kAmxRows + m] = inside ? scratch.image_factors[n] : 0.0f;
      }
      if (++place == window.pitch()) {
        place = 0;
        // By rows, the next row is the next tile's.
        h = by_row ? rows : h + 1;
      }
    }
  }
  return tiles;
}

// Where each tap's lines begin in the window, in 16-bit numbers.
inline void amx_place_taps(const ConvArgs& args, const AmxWindow& window, int64_t* places) {
  const int64_t kw = window.taps / args.kh;
  const int64_t stride_h = window.by_kernel_rows ? 1 : args.stride_h, stride_w = args.stride_w;
  for (int64_t tap = 0; tap < window.taps; ++tap) {
    const int64_t h = tap / kw, v = tap % kw;
    const int64_t phase =
        h % stride_h * (window.by_columns ? kw : stride_w) + (window.by_columns ? v : v % stride_w);
    const int64_t column = window.by_columns ? 0 : v / stride_w;
    places[tap] = 2 * phase * window.steps * window.parts * window.plane() +
                  h / stride_h * window.row + column * window.images * window.line;
  }
}

// The backward of x's BatchNorm and ReLU, for `rows` pixels of `count` channels.
template <typename T>
FASTRES_INLINE void amx_write_backward(const AmxConvArgs& args, const float* tile, int rows,
                                       const int64_t* offsets, int64_t channel, int count,
                                       double* sums, int64_t plane) {
  const Floats mean = load(args.x_mean + channel), scale = load(args.x_scale + channel);
  const Floats bias = load(args.x_bias + channel);
  T* output = static_cast<T*>(args.conv.output) + channel;
  const T* x = static_cast<const T*>(args.x) + channel;
  Floats sum = {}, products = {};
  for (int m = 0; m < rows; ++m) {
    const bool whole = count == kFloatLanes;
    const Floats centered =
        (whole ? load(x + offsets[m]) : load_partial(x + offsets[m], count)) - mean;
    const Floats g =
        select(centered * scale + bias <= Floats{}, Floats{}, load(tile + m * kConvColumns));
    sum += g;
    products += g * centered;
    if (whole) {
      store(output + offsets[m], g * scale, args.conv.stream);
    } else {
      store_partial(output + offsets[m], g * scale, count);
    }
  }
  for (int h = 0; h < 2; ++h) {
    double* p = sums + channel + h * kDoubleLanes;
    store(p, load(p) + to_doubles(sum, h));
    store(p + plane, load(p + plane) + to_doubles(products, h));
  }
}

// Writes `rows` pixels of `channels` sums after the epilogue; returns zero, or NaN where a sum is
// not finite.
template <typename T>
FASTRES_INLINE Floats amx_write(const AmxConvArgs& all, const float* tile, int rows,
                                const int64_t* offsets, int64_t channel, int channels, double* sums,
                                int64_t plane) {
  const ConvArgs& args = all.conv;
  const int whole = channels / kFloatLanes, rest = channels % kFloatLanes;
  const int vecs = whole + (rest != 0 ? 1 : 0);
  Floats bad = {};
  // Numbers of one part pass through as they are.
  for (int v = 0; kAmxPartsOf<T> > 1 && v < vecs; ++v) {
    Floats even = {}, odd = {};  // an addition waits for the one before
    for (int r = 0; r < rows; r += 2) {
      even += load(tile + r * kConvColumns + v * kFloatLanes) * 0.0f;
      odd += load(tile + min(r + 1, rows - 1) * kConvColumns + v * kFloatLanes) * 0.0f;
    }
    bad += even + odd;
  }
  if (all.x != nullptr) {
    for (int v = 0; v < vecs; ++v) {
      amx_write_backward<T>(all, tile + v * kFloatLanes, rows, offsets, channel + v * kFloatLanes,
                            v < whole ? kFloatLanes : rest, sums, plane);
    }
    return bad;
  }
  if (whole == 2) {
    conv_store_of<T, 2>(args)(args, tile, rows, offsets, channel);
  } else if (whole == 1) {
    conv_store_of<T, 1>(args)(args, tile, rows, offsets, channel);
  }
  if (rest != 0) {
    conv_store_partial<T>(args, tile + whole * kFloatLanes, rows, offsets,
                          channel + whole * kFloatLanes, rest);
  }
  for (int v = 0; sums != nullptr && v < vecs; ++v) {
    conv_add_sums(tile + v * kFloatLanes, rows, kConvColumns, sums + channel + v * kFloatLanes,
                  plane);
  }
  return bad;
}

// AmxMeanwhile::write: up to pixel `end`, in runs of those that are not padding.
template <typename T>
void amx_write_pixels(AmxMeanwhile& of, int end) {
  const int64_t co = of.all->conv.co;
  const int64_t plane = (co + kConvPanel - 1) / kConvPanel * kConvPanel;
  for (int m = of.pixel; m < end;) {
    if (of.offsets[m] < 0) {
      ++m;
      continue;
    }
    int last = m + 1;
    while (last < end && of.offsets[last] >= 0) ++last;
    of.bad += amx_write<T>(*of.all, of.tile + m * kConvColumns, last - m, of.offsets + m,
                           of.channel, of.channels, of.sums, plane);
    m = last;
  }
  of.pixel = end;
}

template <typename T>
bool amx_conv_block(const AmxConvArgs& all, const ConvBlock& block, const AmxScratch& scratch,
                    double* sums) {
  const ConvArgs& args = all.conv;
  constexpr int kParts = kAmxPartsOf<T>;
  const AmxWindow window(args, block.n1 - block.n0, block.h1 - block.h0, kParts);
  if (window.by_kernel_rows) {
    amx_fill_rows<T>(args, block, window, scratch.window);
  } else {
    const auto fill = all.z != nullptr          ? amx_fill<T, AmxLoad::gradient>
                      : args.in_mean != nullptr ? amx_fill<T, AmxLoad::prologue>
                                                : amx_fill<T, AmxLoad::plain>;
    fill(all, block, window, scratch.window);
  }
  const int64_t tiles = amx_place_tiles(all, block, window, scratch);
  amx_place_taps(args, window, scratch.places);
  const AmxDepth depth = {.steps = window.steps,
                          .taps = window.taps,
                          .places = scratch.places,
                          .line = window.line,
                          .step = 2 * kParts * window.plane(),
                          .plane = window.plane(),
                          .panel_parts = amx_panel_floats(window.taps, window.channels, kParts)};
  const int64_t packed = amx_packed_panel_floats(window.taps, window.channels, kParts);
  const int64_t end = min(block.panel1 * kConvPanel, args.co);
  static_assert(kConvColumns == 2 * kAmxRows && kFloatLanes == kAmxRows);
  static constexpr AmxConfig config{};
  _tile_loadconfig(&config);
  // The tiles that are multiplied, and those before.
  alignas(64) float out[2][4 * kAmxRows * kConvColumns];
  int current = 0;
  AmxMeanwhile meanwhile{};
  meanwhile.write = amx_write_pixels<T>;
  meanwhile.all = &all;
  meanwhile.sums = sums;
  meanwhile.bytes = sizeof(T);
  // Some tiles by some channels, by a function of where the tiles start and of their sums.
  const auto run = [&](const auto& compute, int64_t tile, int count, int64_t c,
                       int channels) FASTRES_LAMBDA_INLINE {
    constexpr int fewest_pixels = 8;  // of a step: their statistics are added up at a time
    const int pixels = count * kAmxRows;
    const int64_t* offsets = scratch.offsets + tile * kAmxRows;
    const int64_t products = depth.taps * depth.steps;
    meanwhile.pixels_of_step =
        max(fewest_pixels, static_cast<int>((meanwhile.pixels + products - 1) / products));
    if (args.residual != nullptr) {
      meanwhile.ahead_of_step = 2 * kAmxRows / products + 1;
      meanwhile.residual = static_cast<const char*>(args.residual) + c * sizeof(T);
      meanwhile.ahead = offsets + pixels;
      meanwhile.ahead_end = min(meanwhile.ahead + 2 * kAmxRows,
                                static_cast<const int64_t*>(scratch.offsets) + tiles * kAmxRows);
    }
    compute(scratch.starts + tile, out[current]);
    meanwhile.finish();
    meanwhile.tile = out[current];
    meanwhile.offsets = offsets;
    meanwhile.channel = c;
    meanwhile.channels = channels;
    meanwhile.pixel = 0;
    meanwhile.pixels = pixels;
    current = 1 - current;
  };
  // Where weights are few, several pairs of panels at a time: a pixel's channels are written, and
  // its residual is read, in one go.
  const int64_t group = amx_group_pairs(window.taps, window.channels, kParts) * kConvColumns;
  for (int64_t group0 = block.panel0 * kConvPanel; group0 < end; group0 += group) {
    const int64_t group1 = min(group0 + group, end);
    const auto packed_of = [&](int64_t c) FASTRES_LAMBDA_INLINE {
      return args.weight + c / kConvPanel * packed;
    };
    // Pairs of tiles from `first` on by pairs of panels.
    const auto run_pairs = [&](int64_t first, const auto& compute_of) FASTRES_LAMBDA_INLINE {
      for (int64_t t = first; t < tiles; t += 2) {
        const int count = static_cast<int>(min<int64_t>(2, tiles - t));
        for (int64_t c = group0; c < group1; c += kConvColumns) {
          const int channels = static_cast<int>(min<int64_t>(kConvColumns, end - c));
          run(compute_of(c, count, channels > kAmxRows), t, count, c, channels);
        }
      }
    };
    if constexpr (kParts == 1) {
      run_pairs(0, [&](int64_t c, int count, bool wide) FASTRES_LAMBDA_INLINE {
        const auto multiply =
            count == 2 ? (wide ? amx_tiles_of_one_part<2, 2> : amx_tiles_of_one_part<2, 1>)
                       : (wide ? amx_tiles_of_one_part<1, 2> : amx_tiles_of_one_part<1, 1>);
        return [&, multiply, c](const int64_t* starts, float* to) {
          multiply(depth, scratch.window, starts, packed_of(c), to, kConvColumns, meanwhile);
        };
      });
    } else {
      const auto parts_of = [&](int64_t c) FASTRES_LAMBDA_INLINE {
        return scratch.weights + (c - group0) / kConvPanel * depth.panel_parts;
      };
      // The first tiles are those that split the weights; the others come in pairs.
      const int first = static_cast<int>(tiles <= 4 ? tiles : 4 - tiles % 2);
      const bool ring = tiles <= 4;
      const bool alone = window.last_alone(block.h1 - block.h0, args.ow);
      const auto multiply =
          first == 4   ? alone ? amx_tiles<3, 1, true, true> : amx_tiles<4, 1, true>
          : first == 3 ? alone ? amx_tiles<2, 1, true, true> : amx_tiles<3, 1, true>
          : first == 2 ? alone ? amx_tiles<1, 1, true, true> : amx_tiles<2, 1, true>
                       : amx_tiles<1, 1, true>;
      for (int64_t c = group0; c < group1; c += kConvPanel) {
        const auto split = [&](const int64_t* starts, float* to) {
          multiply(depth, scratch.window, starts, packed_of(c), parts_of(c), ring, to, kConvColumns,
                   meanwhile);
        };
        run(split, 0, first, c, static_cast<int>(min<int64_t>(kConvPanel, end - c)));
      }
      run_pairs(first, [&](int64_t c, int, bool wide) FASTRES_LAMBDA_INLINE {
        const auto multiply_split = wide ? amx_tiles<2, 2, false> : amx_tiles<2, 1, false>;
        return [&, multiply_split, c](const int64_t* starts, float* to) {
          multiply_split(depth, scratch.window, starts, nullptr, parts_of(c), false, to,
                         kConvColumns, meanwhile);
        };
      });
    }
  }
  meanwhile.finish();
  end_stream(args.stream);
  _tile_release();
  return all_zero(meanwhile.bad);
}

// Packs panels [panel0, panel1): channels that fill a tap's last step are zero, and so is the line
// that is left over.
template <int kParts>
void amx_pack(const ConvWeight& w, float* packed, int64_t panel0, int64_t panel1) {
  const bool by_rows = amx_takes_rows(w.ci, w.kw);
  const int64_t taps = by_rows ? w.kh : w.kh * w.kw, steps = by_rows ? 1 : amx_steps(w.ci);
  constexpr int64_t kStep = kParts == 1 ? kAmxTile : kAmxPackedStep;  // floats of a packed step
  alignas(64) float step[kAmxPackedStep];
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    float* out = packed + panel * steps * taps * kStep;
    const float* in = w.data + panel * kConvPanel * w.stride_o;
    const int count = static_cast<int>(min<int64_t>(kConvPanel, w.co - panel * kConvPanel));
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t tap = 0; tap < taps; ++tap, out += kParts == 1 ? kAmxTile : kAmxStreamStep) {
        int64_t filled = 0;
        if (by_rows) {
          for (int64_t v = 0; v < w.kw; ++v, filled += w.ci) {
            conv_pack_tap(w, in + tap * w.stride_h + v * w.stride_w, 0, w.ci, count,
                          step + filled * kConvPanel);
          }
        } else {
          filled = min<int64_t>(kAmxDepth, w.ci - k * kAmxDepth);
          const float* first = in + tap / w.kw * w.stride_h + tap % w.kw * w.stride_w;
          conv_pack_tap(w, first + k * kAmxDepth * w.stride_i, 0, filled, count, step);
        }
        conv_zero(step + filled * kConvPanel, kAmxPackedStep - filled * kConvPanel);
        if constexpr (kParts == 1) {
          for (int64_t i = 0; i < kAmxPackedStep; i += 2 * kConvPanel) {
            _mm512_store_si512(out + i / 2,
                               amx_rounded_pairs(load(step + i), load(step + i + kConvPanel)));
          }
        } else {
          for (int64_t i = 0; i < kAmxPackedStep; i += kFloatLanes) {
            const int64_t stream = i / kAmxStreamStep, at = i % kAmxStreamStep;
            store(out + stream * steps * taps * kAmxStreamStep + at, load(step + i));
          }
        }
      }
    }
  }
  const int64_t panels = (w.co + kConvPanel - 1) / kConvPanel;
  if (panel1 == panels) conv_zero(packed + panels * steps * taps * kStep, kConvPanel);
}

}  // namespace fastres::cpu::FASTRES_ISA
