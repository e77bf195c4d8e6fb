// Convolution on the matrix unit's 8-bit integers: a tile of up to 16 output pixels by 16 output
// channels at a time, over all taps and input channels. See conv_digits.h.

namespace fastres::cpu::FASTRES_ISA {

// Numbers of images are 0x7f000000 at most, of which digits are made by adding this: a digit that
// is negative borrows from the next.
inline constexpr uint32_t kDigitBias = 0x00808080;

// The four digits of 64 integers, each `plane` floats after the other, the highest first.
FASTRES_INLINE void digits_store(const __m512i (&x)[4], float* to, int64_t plane) {
  // Of two vectors' bytes, all of one place and then all of another.
  alignas(64) static constexpr auto order = [] {
    struct {
      uint8_t of[2][64];
    } o{};
    for (int i = 0; i < 64; ++i) {
      const int number = i % 32, high = i < 32 ? 1 : 0;
      o.of[0][i] = static_cast<uint8_t>(4 * number + 2 + high);  // the digits 3 and 2
      o.of[1][i] = static_cast<uint8_t>(4 * number + high);      // 1 and 0
    }
    return o;
  }();
  __m512i biased[4];
  const __m512i bias = _mm512_set1_epi32(kDigitBias);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    biased[v] = _mm512_xor_si512(_mm512_maskz_add_epi32(0xffff, x[v], bias), bias);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half, to += 2 * plane) {
    const __m512i places = _mm512_load_si512(order.of[half]);
    const __m512i a = _mm512_permutex2var_epi8(biased[0], places, biased[1]);
    const __m512i b = _mm512_permutex2var_epi8(biased[2], places, biased[3]);
    _mm512_store_si512(to, _mm512_maskz_shuffle_i64x2(0xff, a, b, 0x44));
    _mm512_store_si512(to + plane, _mm512_maskz_shuffle_i64x2(0xff, a, b, 0xee));
  }
}

// Calls `f(v, x)` with the vectors of a pixel's channels times `scale`; the last may be partial.
template <typename F>
FASTRES_INLINE void digits_each_vector(const float* in, const float* scale, int64_t channels,
                                       const F& f) {
  int64_t c = 0;
  for (; c + kFloatLanes <= channels; c += kFloatLanes) f(load(in + c) * load(scale + c));
  if (c < channels) {
    f(load_partial(in + c, static_cast<int>(channels - c)) * load(scale + c));
  }
}

// A pixel's channels in digits into its line of every step.
FASTRES_INLINE void digits_fill_pixel(const float* in, const float* scale, int64_t channels,
                                      float image_scale, float* to, int64_t plane) {
  const Floats image = splat(image_scale);
  for (int64_t c = 0; c < channels; c += kDigitDepth, to += kPixelDigits * plane) {
    __m512i numbers[4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t at = c + v * kFloatLanes, rest = channels - at;
      if (rest <= 0) break;
      const Floats x =
          rest >= kFloatLanes ? load(in + at) : load_partial(in + at, static_cast<int>(rest));
      numbers[v] = _mm512_maskz_cvtps_epi32(0xffff, bit_cast<__m512>(x * load(scale + at) * image));
    }
    digits_store(numbers, to, plane);
  }
}

// What an image's part of the block is multiplied by before its numbers are rounded to integers,
// and its inverse; returns false where rounding would be an error of more than 2^-23.5 of the
// numbers' norm, or where a number is not finite.
inline bool digits_scale(const AmxConvArgs& all, const ConvBlock& block, int64_t n, float* scale,
                         float* factor) {
  const ConvArgs& args = all.conv;
  const int64_t first = max<int64_t>(block.h0 * args.stride_h - args.pad_h, 0);
  const int64_t last = min((block.h1 - 1) * args.stride_h - args.pad_h + args.kh, args.ih);
  Floats largest[2] = {}, squares[2] = {};
  for (int64_t h = first; h < last; ++h) {
    const float* row = static_cast<const float*>(args.input) +
                       (block.n0 + n) * args.input_stride_n + h * args.input_stride_h;
    for (int64_t w = 0; w < args.iw; ++w, row += args.input_stride_w) {
      int v = 0;
      digits_each_vector(row, all.weights.input_scale, args.ci,
                         [&](Floats x) FASTRES_LAMBDA_INLINE {
                           // As integers, where a NaN is larger than all else.
                           const Uints size = bit_cast<Uints>(x) & 0x7fffffff;
                           const Uints most = bit_cast<Uints>(largest[v]);
                           largest[v] = bit_cast<Floats>(size > most ? size : most);
                           squares[v] += x * x;
                           v = 1 - v;
                         });
    }
  }
  uint32_t most = 0;
  float sum = 0.0f;
  for (int v = 0; v < 2; ++v) {
    const Uints sizes = bit_cast<Uints>(largest[v]);
    for (int i = 0; i < kFloatLanes; ++i) {
      most = max(most, static_cast<uint32_t>(sizes[i]));
      sum += squares[v][i];
    }
  }
  *scale = *factor = 1.0f;
  if (most == 0) return true;
  // Of the least power of two of which 127/128 are at least the largest number.
  const int exponent = static_cast<int>((most + 0x00020000) >> 23) - 126;
  constexpr int most_exponent = 90;  // at which all scales are normal numbers
  if (exponent > most_exponent || exponent < -most_exponent) return false;
  *scale = bit_cast<float>(static_cast<uint32_t>(127 + 31 - exponent) << 23);
  *factor = bit_cast<float>(static_cast<uint32_t>(127 - 31 + exponent) << 23);
  const double numbers = static_cast<double>((last - first) * args.iw * args.ci);
  const double error = numbers / 12.0 * *factor * *factor;
  return error * 0x1p47 <= static_cast<double>(sum) && sum <= 0x1p100f;
}

// What is left of the tile before while the next is multiplied.
struct DigitsMeanwhile : AmxMeanwhile {
  ConvStoreFn store;  // of whole panels
  const float *factors, *channel_factors;
};

// AmxMeanwhile::write: of sums [digit sum][pixel][16 channels], of which one is 2^8 times the next.
inline void digits_write_pixels(AmxMeanwhile& meanwhile, int end) {
  auto& of = static_cast<DigitsMeanwhile&>(meanwhile);
  alignas(64) float rows[kAmxRows * kConvColumns];
  const auto* sums = reinterpret_cast<const int32_t*>(of.tile);
  const Floats channels = load(of.channel_factors);
  const auto floats = [](const int32_t* p) FASTRES_LAMBDA_INLINE {
    return bit_cast<Floats>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_load_si512(p)));
  };
  for (int m = of.pixel; m < end;) {
    if (of.offsets[m] < 0) {
      ++m;
      continue;
    }
    const int first = m;
    for (; m < end && of.offsets[m] >= 0; ++m) {
      const int32_t* p = sums + m * kAmxRows;
      constexpr float digit = 0x1p-8f;
      const Floats low = floats(p + 2 * 256) + floats(p + 3 * 256) * digit;
      const Floats sum = floats(p) + (floats(p + 256) + low * digit) * digit;
      store(rows + (m - first) * kConvColumns, sum * (channels * splat(of.factors[m])));
    }
    if (of.channels == kConvPanel) {
      of.store(of.all->conv, rows, m - first, of.offsets + first, of.channel);
    } else {
      conv_store_partial<float>(of.all->conv, rows, m - first, of.offsets + first, of.channel,
                                of.channels);
    }
  }
  of.pixel = end;
}

// The four largest sums of digits' products, [sum][pixel][16 channels]: of a pixel's digits i and a
// weight's digits j, i + j places below the highest. `ahead` are lines that will be read later.
template <int kDigits, bool kNext>
__attribute__((noinline)) void digits_tile(const AmxDepth& d, const float* window, int64_t start,
                                           const int8_t* weight, int32_t* out, const int8_t* ahead,
                                           int lines, const int8_t* ahead_end,
                                           AmxMeanwhile& meanwhile) {
  constexpr int kStride = 64, kTile = 16 * kStride, kStep = kDigits * kTile;
  alignas(64) int8_t nothing[kTile];  // as in amx_tiles
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto* step = reinterpret_cast<const uint16_t*>(window) + start;
  int64_t current = 0;
  for (int64_t k = 0; k < d.steps; ++k, step += d.step) {
    for (int64_t tap = 0; tap < d.taps; ++tap, ++current, weight += kStep) {
      const uint16_t* const line = step + d.places[tap];
      const auto pixels = [&](int64_t digit)
                              FASTRES_LAMBDA_INLINE { return line + 2 * digit * d.plane; };
      // The next step's weights, of one tile: what it loads would wait for the third level cache.
      const auto prefetch = [&](int digit) FASTRES_LAMBDA_INLINE {
        if constexpr (!kNext) return;
        for (int i = 0; i < kTile; i += 64) {
          __builtin_prefetch(weight + kStep + digit * kTile + i, 0, 3);
        }
      };
      _tile_loadd(6, weight, kStride);
      _tile_loadd(4, pixels(0), kStride);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(5, pixels(1), kStride);
      _tile_dpbssd(1, 5, 6);
      prefetch(0);
      _tile_loadd(7, weight + kTile, kStride);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 7);
      prefetch(1);
      _tile_loadd(7, weight + 2 * kTile, kStride);
      _tile_dpbssd(2, 4, 7);
      _tile_dpbssd(3, 5, 7);
      prefetch(2);
      if constexpr (kDigits == 4) {
        _tile_loadd(7, weight + 3 * kTile, kStride);
        _tile_dpbssd(3, 4, 7);
        prefetch(3);
      }
      _tile_loadd(5, pixels(2), kStride);
      _tile_dpbssd(2, 5, 6);
      _tile_loadd(4, pixels(3), kStride);
      _tile_dpbssd(3, 4, 6);
      _tile_loadd(7, weight + kTile, kStride);
      _tile_dpbssd(3, 5, 7);
      if (current % 4 == 3) _tile_stored(6, nothing, kStride);
      for (int i = 0; i < lines && ahead < ahead_end; ++i, ahead += 64) {
        __builtin_prefetch(ahead, 0, 2);
      }
      meanwhile.step();
    }
  }
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + 256, kStride);
  _tile_stored(2, out + 512, kStride);
  _tile_stored(3, out + 768, kStride);
}

inline bool digits_conv_block(const AmxConvArgs& all, const ConvBlock& block,
                              const AmxScratch& scratch, double*) {
  const ConvArgs& args = all.conv;
  const DigitWeights& weights = all.weights;
  const int64_t rows = block.h1 - block.h0;
  const AmxWindow window(args, block.n1 - block.n0, rows, kPixelDigits);
  for (int64_t n = 0; n < window.images; ++n) {
    if (!digits_scale(all, block, n, scratch.image_scales + n, scratch.image_factors + n)) {
      return false;
    }
  }
  const auto fill = [&](int64_t n, int64_t at, float* pixel) FASTRES_LAMBDA_INLINE {
    digits_fill_pixel(static_cast<const float*>(args.input) + at, weights.input_scale, args.ci,
                      scratch.image_scales[n], pixel, window.plane());
  };
  if (window.by_columns) {
    amx_fill_columns(args, block, window, scratch.window, fill);
  } else {
    amx_fill_window(args, block, window, scratch.window, fill);
  }
  // Tiles of about equal numbers of pixels: fewer rows of a tile take less time.
  const int64_t count = window.tiles(rows, args.ow), row_tiles = window.row_tiles(args.ow);
  const int64_t line = args.ow * window.images;
  const int64_t tile_rows = count == rows * row_tiles
                                ? (line + row_tiles - 1) / row_tiles
                                : ((rows - 1) * window.pitch() + line + count - 1) / count;
  const int64_t tiles = amx_place_tiles(all, block, window, scratch, tile_rows);
  amx_place_taps(args, window, scratch.places);
  const AmxDepth depth = {.steps = window.steps,
                          .taps = window.taps,
                          .places = scratch.places,
                          .line = window.line,
                          .step = 2 * kPixelDigits * window.plane(),
                          .plane = window.plane(),
                          .panel_parts = 0};
  AmxConfig config{};
  for (int tile = 0; tile < 6; ++tile) config.rows[tile] = static_cast<uint8_t>(tile_rows);
  _tile_loadconfig(&config);
  alignas(64) int32_t out[2][4 * kAmxRows * kAmxRows];
  int current = 0;
  DigitsMeanwhile meanwhile{};
  meanwhile.write = digits_write_pixels;
  meanwhile.all = &all;
  meanwhile.store = conv_store_of<float, 1>(args);
  meanwhile.bytes = sizeof(float);
  const int64_t products = depth.taps * depth.steps;
  const int64_t panel_bytes = products * weights.digits * 1024;
  // Panels whose weights stay in the second level cache while all tiles pass by.
  constexpr int64_t group_bytes = 128 * 1024;
  const int64_t group = max<int64_t>(group_bytes / panel_bytes, 1);
  const auto multiply = weights.digits == 4
                            ? tiles == 1 ? digits_tile<4, true> : digits_tile<4, false>
                        : tiles == 1 ? digits_tile<3, true>
                                     : digits_tile<3, false>;
  const int8_t* const end = weights.data + block.panel1 * panel_bytes;
  for (int64_t first = block.panel0; first < block.panel1; first += group) {
    const int64_t last = min(first + group, block.panel1);
    // The next group's weights, a part with every tile.
    const int8_t* const next = weights.data + last * panel_bytes;
    const int64_t calls = tiles * (last - first);
    const int64_t lines = (group * panel_bytes / 64 + calls * products - 1) / (calls * products);
    int64_t call = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t panel = first; panel < last; ++panel, ++call) {
        const int64_t c = panel * kConvPanel;
        const int64_t* const offsets = scratch.offsets + t * kAmxRows;
        constexpr int fewest_pixels = 4;  // of a step
        meanwhile.pixels_of_step =
            max(fewest_pixels, static_cast<int>((meanwhile.pixels + products - 1) / products));
        if (args.residual != nullptr) {
          meanwhile.ahead_of_step = kAmxRows / products + 1;
          meanwhile.residual = static_cast<const char*>(args.residual) + c * sizeof(float);
          meanwhile.ahead = offsets;
          meanwhile.ahead_end = offsets + tile_rows;
        }
        multiply(depth, scratch.window, scratch.starts[t], weights.data + panel * panel_bytes,
                 out[current], next + call * products * lines * 64,
                 tiles > 1 ? static_cast<int>(lines) : 0, end, meanwhile);
        meanwhile.finish();
        meanwhile.tile = reinterpret_cast<const float*>(out[current]);
        meanwhile.factors = scratch.factors + t * kAmxRows;
        meanwhile.channel_factors = weights.output_scale + c;
        meanwhile.offsets = offsets;
        meanwhile.channel = c;
        meanwhile.channels = static_cast<int>(min<int64_t>(kConvPanel, args.co - c));
        meanwhile.pixel = 0;
        meanwhile.pixels = static_cast<int>(tile_rows);
        current = 1 - current;
      }
    }
  }
  meanwhile.finish();
  end_stream(args.stream);
  _tile_release();
  return true;
}

}  // namespace fastres::cpu::FASTRES_ISA
