// The weight gradient on AMX tiles: two tiles of 16 input channels by two of 16 output channels at
// a time, over all pixels of a block.

namespace fastres::cpu::FASTRES_ISA {

// The offsets of the window's pixels in the input, -1 where there is none, in the order
// [group][row][phase][variant][column][image].
inline void amx_input_offsets(const ConvArgs& c, const AmxGradientBlock& b,
                              const AmxGradientLayout& l, int64_t* offsets) {
  for (int64_t i = 0; i < l.window; ++i) offsets[i] = -1;
  for (int64_t g = 0; g < b.groups; ++g) {
    const int64_t n0 = b.n0 + g * b.images, images = min(b.images, b.n1 - n0);
    for (int64_t row = 0; row < l.rows * l.phases; ++row) {
      const int64_t ih = (b.h0 + row / l.phases) * c.stride_h + row % l.phases - c.pad_h;
      for (int64_t v = 0; v < l.variants; ++v, offsets += l.variant_row) {
        int64_t* to = offsets;
        for (int64_t column = 0; column < l.columns; ++column, to += b.images) {
          const int64_t iw = (b.w0 + column) * c.stride_w + v - c.pad_w;
          if (ih < 0 || ih >= c.ih || iw < 0 || iw >= c.iw) continue;
          const int64_t pixel =
              n0 * c.input_stride_n + ih * c.input_stride_h + iw * c.input_stride_w;
          for (int64_t n = 0; n < images; ++n) to[n] = pixel + n * c.input_stride_n;
        }
      }
    }
  }
}

// The same of the output gradient's pixels, in the order [group][row][column][image].
inline void amx_gradient_offsets(const ConvArgs& c, const AmxGradientBlock& b,
                                 const AmxGradientLayout& l, int64_t* offsets) {
  for (int64_t i = 0; i < l.gradient; ++i) offsets[i] = -1;
  for (int64_t g = 0; g < b.groups; ++g) {
    const int64_t n0 = b.n0 + g * b.images, images = min(b.images, b.n1 - n0);
    for (int64_t h = b.h0; h < b.h1; ++h) {
      int64_t* to = offsets + g * l.gradient_group + (h - b.h0) * l.gradient_row;
      for (int64_t w = b.w0; w < b.w1; ++w, to += b.images) {
        const int64_t pixel = ((n0 * c.oh + h) * c.ow + w) * c.co;
        for (int64_t n = 0; n < images; ++n) to[n] = pixel + n * c.oh * c.ow * c.co;
      }
    }
  }
}

// Four channels of 16 rows, two rows apart, as four vectors.
FASTRES_INLINE void amx_transpose(const float* const* rows, int64_t c, Floats* out) {
  Floats v[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    __m512 x = _mm512_maskz_broadcast_f32x4(0x000f, _mm_loadu_ps(rows[2 * r] + c));
    x = _mm512_mask_broadcast_f32x4(x, 0x00f0, _mm_loadu_ps(rows[2 * (r + 4)] + c));
    x = _mm512_mask_broadcast_f32x4(x, 0x0f00, _mm_loadu_ps(rows[2 * (r + 8)] + c));
    v[r] = _mm512_mask_broadcast_f32x4(x, 0xf000, _mm_loadu_ps(rows[2 * (r + 12)] + c));
  }
  const auto low = [](Floats a, Floats b) FASTRES_LAMBDA_INLINE {
    return bit_cast<__m512d>(_mm512_maskz_unpacklo_ps(0xffff, a, b));
  };
  const auto high = [](Floats a, Floats b) FASTRES_LAMBDA_INLINE {
    return bit_cast<__m512d>(_mm512_maskz_unpackhi_ps(0xffff, a, b));
  };
  const __m512d a = low(v[0], v[1]), b = low(v[2], v[3]);
  const __m512d c2 = high(v[0], v[1]), d = high(v[2], v[3]);
  out[0] = bit_cast<Floats>(_mm512_maskz_unpacklo_pd(0xff, a, b));
  out[1] = bit_cast<Floats>(_mm512_maskz_unpackhi_pd(0xff, a, b));
  out[2] = bit_cast<Floats>(_mm512_maskz_unpacklo_pd(0xff, c2, d));
  out[3] = bit_cast<Floats>(_mm512_maskz_unpackhi_pd(0xff, c2, d));
}

// The channels of a mask, as floats or as integers.
FASTRES_INLINE Floats amx_load(const float* p, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, p);
}
FASTRES_INLINE __m512i amx_load_bits(const bfloat16* p, __mmask16 mask) {
  return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, p));
}
FASTRES_INLINE Floats amx_load(const bfloat16* p, __mmask16 mask) {
  return bit_cast<Floats>(_mm512_maskz_slli_epi32(0xffff, amx_load_bits(p, mask), 16));
}

// Two pixels' numbers as pairs, the first's in the lower halves; zeros for no pixel.
FASTRES_INLINE __m512i amx_pairs_of(const bfloat16* first, const bfloat16* second, __mmask16 mask) {
  const __m512i a = first == nullptr ? _mm512_setzero_si512() : amx_load_bits(first, mask);
  const __m512i b = second == nullptr ? _mm512_setzero_si512() : amx_load_bits(second, mask);
  return _mm512_maskz_or_epi32(0xffff, a, _mm512_maskz_slli_epi32(0xffff, b, 16));
}

// The input by channels, where it is bfloat16.
template <bool kPrologue>
void amx_gradient_left(const ConvArgs& conv, const AmxGradientBlock& b, const AmxGradientLayout& l,
                       const int64_t* offsets, const bfloat16* input, uint16_t* left) {
  const int64_t panel = kAmxPanel * l.window;
  const int64_t lists = l.phases * l.variants;
  int64_t row = 0, phase = 0, variant = 0, column = 0;
  for (int64_t p = 0; p < l.window; p += kAmxPixels) {
    const int64_t pixel =
        ((variant * l.phases + phase) * b.groups * l.rows + row) * l.variant_row + column;
    column += kAmxPixels;
    if (column == l.variant_row) column = 0, ++variant;
    if (variant == l.variants) variant = 0, ++phase;
    if (phase == l.phases) phase = 0, ++row;
    const int64_t ahead = min(p + (l.variant_row > kAmxPixels ? kAmxPixels : lists * kAmxPixels),
                              l.window - kAmxPixels);
    for (int64_t c = b.ci0; c < b.ci1; c += kFloatLanes) {
      const int64_t count = min<int64_t>(kFloatLanes, b.ci1 - c);
      const __mmask16 channels = static_cast<__mmask16>((1u << count) - 1);
      alignas(64) float pairs[kAmxPixels / 2][kFloatLanes];
      const float* rows[kAmxPixels];
      for (int i = 0; i < kAmxPixels; i += 2) {
        const bfloat16* at[2];
        for (int j = 0; j < 2; ++j) {
          const int64_t offset = offsets[p + i + j];
          at[j] = offset < 0 ? nullptr : input + offset + c;
          _mm_prefetch(input + max<int64_t>(offsets[ahead + i + j], 0) + c, _MM_HINT_T0);
        }
        __m512i pair;
        if constexpr (kPrologue) {
          const Floats mean = load(conv.in_mean + c), scale = load(conv.in_scale + c);
          const Floats bias = load(conv.in_bias + c);
          const auto value = [&](const bfloat16* from) FASTRES_LAMBDA_INLINE {
            if (from == nullptr) return Floats{};
            return relu((amx_load(from, channels) - mean) * scale + bias);
          };
          pair = amx_rounded_pairs(value(at[0]), value(at[1]));
        } else {
          pair = amx_pairs_of(at[0], at[1], channels);
        }
        _mm512_store_si512(pairs[i / 2], pair);
        rows[i] = pairs[i / 2];
      }
      const int64_t k = c - b.ci0;
      uint16_t* out = left + k / kAmxPanel * panel + pixel * kAmxPanel + k % kAmxPanel * kAmxPixels;
      for (int q = 0; q < kFloatLanes; q += 4) {
        Floats channel[4];
        amx_transpose(rows, q, channel);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, out += kAmxPixels) {
          _mm512_store_si512(out, bit_cast<__m512i>(channel[i]));
        }
      }
    }
  }
}

// The input's parts by channels, where it is float32.
template <bool kPrologue>
void amx_gradient_left(const ConvArgs& conv, const AmxGradientBlock& b, const AmxGradientLayout& l,
                       const int64_t* offsets, const float* input, uint16_t* left) {
  constexpr int64_t part = kAmxPanel * kAmxPixels;
  const int64_t panel = kAmxParts * kAmxPanel * l.window;
  const int64_t lists = l.phases * l.variants;
  int64_t row = 0, phase = 0, variant = 0, column = 0;
  for (int64_t p = 0; p < l.window; p += kAmxPixels) {
    const int64_t pixel =
        ((variant * l.phases + phase) * b.groups * l.rows + row) * l.variant_row + column;
    column += kAmxPixels;
    if (column == l.variant_row) column = 0, ++variant;
    if (variant == l.variants) variant = 0, ++phase;
    if (phase == l.phases) phase = 0, ++row;
    const float* rows[kAmxPixels];
    const float* next[kAmxPixels];
    const int64_t ahead = min(p + (l.variant_row > kAmxPixels ? kAmxPixels : lists * kAmxPixels),
                              l.window - kAmxPixels);
    uint32_t even = 0, odd = 0;
    for (int i = 0; i < kAmxPixels; ++i) {
      const int64_t offset = offsets[p + i];
      rows[i] = input + (offset < 0 ? 0 : offset);
      next[i] = input + max<int64_t>(offsets[ahead + i], 0);
      (i % 2 == 0 ? even : odd) |= static_cast<uint32_t>(offset >= 0) << (i / 2);
    }
    for (int64_t c = b.ci0; c < b.ci1; c += kFloatLanes) {
      alignas(64) float partial[kAmxPixels][kFloatLanes];
      const float* partial_rows[kAmxPixels];
      const float* const* from = rows;
      int64_t channel = c;
      if (b.ci1 - c < kFloatLanes) {
        const __mmask16 mask = static_cast<__mmask16>((1u << (b.ci1 - c)) - 1);
        for (int i = 0; i < kAmxPixels; ++i) {
          _mm512_store_ps(partial[i], _mm512_maskz_loadu_ps(mask, rows[i] + c));
          partial_rows[i] = partial[i];
        }
        from = partial_rows;
        channel = 0;
      }
      const int64_t k = c - b.ci0;
      uint16_t* out =
          left + k / kAmxPanel * panel + pixel * kAmxParts * kAmxPanel + k % kAmxPanel * kAmxPixels;
#pragma GCC unroll 1
      for (int q = 0; q < kFloatLanes; q += 4) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) _mm_prefetch(next[2 * q + i] + c, _MM_HINT_T0);
        Floats first[4], second[4];
        amx_transpose(from, channel + q, first);
        amx_transpose(from + 1, channel + q, second);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, out += kAmxPixels) {
          Floats x = first[i], y = second[i];
          if (kPrologue) {
            const float* mean = conv.in_mean + c + q + i;
            const float* scale = conv.in_scale + c + q + i;
            const float* bias = conv.in_bias + c + q + i;
            x = relu((x - *mean) * *scale + *bias);
            y = relu((y - *mean) * *scale + *bias);
          }
          x = _mm512_maskz_mov_ps(static_cast<__mmask16>(even), x);
          y = _mm512_maskz_mov_ps(static_cast<__mmask16>(odd), y);
          amx_split_pairs<false>(out, part, x, y);
        }
      }
    }
  }
}

// The output gradient's parts by pairs of pixels.
template <typename T, bool kStats>
void amx_gradient_right(const AmxGradientArgs& args, const AmxGradientBlock& b,
                        const AmxGradientLayout& l, const int64_t* offsets, uint16_t* right) {
  constexpr int64_t part = 2 * kAmxPanel;
  constexpr int64_t pair = kAmxPartsOf<T> * part;
  const T* const dz = static_cast<const T*>(args.dz);
  const T* const all_z = static_cast<const T*>(args.z);
  const int64_t panel = l.gradient / 2 * pair;
  for (int64_t p = 0; p < l.gradient; p += 2) {
    const int64_t first = offsets[p], second = offsets[p + 1];
    uint16_t* to = right + p / 2 * pair;
    const int64_t ahead = min(p + kAmxPixels / 2, l.gradient - 2);
    const int64_t next[2] = {max<int64_t>(offsets[ahead], 0), max<int64_t>(offsets[ahead + 1], 0)};
    for (int64_t c = b.co0; c < b.co1; c += kFloatLanes) {
      for (int64_t n : next) {
        _mm_prefetch(dz + n + c, _MM_HINT_T0);
        if (kStats) _mm_prefetch(all_z + n + c, _MM_HINT_T0);
      }
      const int64_t left = min<int64_t>(kFloatLanes, b.co1 - c);
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      const auto value = [&](int64_t offset) FASTRES_LAMBDA_INLINE {
        if (offset < 0) return Floats{};
        Floats x = amx_load(dz + offset + c, mask);
        if (kStats) {
          const Floats z = amx_load(all_z + offset + c, mask);
          x += load(args.constant + c) + load(args.slope + c) * (z - load(args.mean + c));
          x = _mm512_maskz_mov_ps(mask, x);
        }
        return x;
      };
      const int64_t k = c - b.co0;
      uint16_t* const place = to + k / kAmxPanel * panel + k % kAmxPanel * 2;
      if constexpr (kAmxPartsOf<T> > 1) {
        amx_split_pairs<true>(place, part, value(first), value(second));
      } else if constexpr (kStats) {
        _mm512_store_si512(place, amx_rounded_pairs(value(first), value(second)));
      } else {
        _mm512_store_si512(place, amx_pairs_of(first < 0 ? nullptr : dz + first + c,
                                               second < 0 ? nullptr : dz + second + c, mask));
      }
    }
  }
}

// A tap's pixels: `groups` times `rows` runs of `steps` products each.
struct AmxRuns {
  int64_t groups, rows, steps;
  int64_t left_group, left_row, right_group, right_row;  // numbers
};

// The sums [I][O] of I tiles of input channels and O tiles of output channels.
template <int kParts, int I, int O>
void amx_gradient_products(const uint16_t* left, const uint16_t* right, const AmxRuns& runs,
                           float* tiles) {
  constexpr int64_t left_part = kAmxPanel * kAmxPixels, left_bytes = 2 * kAmxPixels;
  constexpr int64_t right_part = 2 * kAmxPanel, right_bytes = 2 * kParts * right_part;
  constexpr int64_t step_numbers = kParts * left_part;
  _tile_zero(0);
  if (O == 2) _tile_zero(1);
  if (I == 2) _tile_zero(2);
  if (I == 2 && O == 2) _tile_zero(3);
  for (int64_t g = 0; g < runs.groups; ++g) {
    for (int64_t row = 0; row < runs.rows; ++row) {
      const uint16_t* a = left + g * runs.left_group + row * runs.left_row;
      const uint16_t* b = right + g * runs.right_group + row * runs.right_row;
      for (int64_t step = 0; step < runs.steps; ++step) {
        const auto load_left = [&](int i) FASTRES_LAMBDA_INLINE {
          _tile_loadd(4, a + i * left_part, left_bytes);
          if (I == 2) _tile_loadd(5, a + i * left_part + left_part / 2, left_bytes);
        };
        const auto load_right = [&](int i) FASTRES_LAMBDA_INLINE {
          _tile_loadd(6, b + i * right_part, right_bytes);
          if (O == 2) _tile_loadd(7, b + i * right_part + 32, right_bytes);
        };
        const auto multiply = [&]() FASTRES_LAMBDA_INLINE {
          _tile_dpbf16ps(0, 4, 6);
          if (O == 2) _tile_dpbf16ps(1, 4, 7);
          if (I == 2) _tile_dpbf16ps(2, 5, 6);
          if (I == 2 && O == 2) _tile_dpbf16ps(3, 5, 7);
        };
        if constexpr (kParts == 1) {
          load_left(0);
          load_right(0);
          multiply();
        } else {
          load_left(2);
          load_right(0);
          multiply();
          load_left(1);
          multiply();
          load_right(1);
          multiply();
          load_left(0);
          multiply();
          load_right(2);
          multiply();
          load_right(0);
          multiply();
        }
        a += step_numbers;
        b += step_numbers;
      }
    }
  }
  constexpr int64_t row_bytes = 64, tile = 256;
  _tile_stored(0, tiles, row_bytes);
  if (O == 2) _tile_stored(1, tiles + tile, row_bytes);
  if (I == 2) _tile_stored(2, tiles + 2 * tile, row_bytes);
  if (I == 2 && O == 2) _tile_stored(3, tiles + 3 * tile, row_bytes);
}

using AmxProductsFn = void (*)(const uint16_t*, const uint16_t*, const AmxRuns&, float*);

FASTRES_INLINE int64_t amx_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Output positions [begin, end) of [begin0, end0) at which a tap is within the input.
struct AmxRange {
  int64_t begin, end;
};
inline AmxRange amx_range(int64_t begin0, int64_t end0, int64_t tap, int64_t stride, int64_t pad,
                          int64_t size) {
  const int64_t begin = tap < pad ? amx_ceil_div(pad - tap, stride) : 0;
  const int64_t last = size - 1 + pad - tap;
  const int64_t end = last < 0 ? 0 : last / stride + 1;
  return {max(begin0, begin), min(end0, end)};
}

// Writes the sums of a pair of panels, whose channels begin at ci0 and co0.
inline bool amx_write(const ConvArgs& c, const float* sums, int64_t ci0, int64_t ci1, int64_t co0,
                      int64_t co1, const WinogradKernelGradient& out) {
  constexpr int64_t tile = 16 * 16;
  const int64_t taps = c.kh * c.kw;
  Floats bad = {};
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places =
      _mm512_maskz_mullo_epi32(0xffff, lanes, _mm512_set1_epi32(static_cast<int>(out.stride_i)));
  for (int64_t co = co0; co < min(co0 + kAmxPanel, co1); co += 16) {
    for (int64_t ci = ci0; ci < min(ci0 + kAmxPanel, ci1); ci += 16) {
      const __mmask16 mask = static_cast<__mmask16>((1u << min<int64_t>(16, ci1 - ci)) - 1);
      const float* from = sums + ((ci - ci0) / 16 * 2 + (co - co0) / 16) * tile;
      for (int64_t tap = 0; tap < taps; ++tap, from += kAmxSumFloats) {
        const float* rows[32];
        for (int r = 0; r < 16; ++r) rows[2 * r] = from + r * 16;
        float* to = out.data + co * out.stride_o + ci * out.stride_i + tap / c.kw * out.stride_h +
                    tap % c.kw * out.stride_w;
        for (int64_t o = 0; o < min<int64_t>(16, co1 - co); o += 4) {
          Floats channels[4];
          amx_transpose(rows, o, channels);
          for (int64_t k = 0; k < min<int64_t>(4, co1 - co - o); ++k) {
            const Floats x = _mm512_maskz_mov_ps(mask, channels[k]);
            bad += x * 0.0f;
            float* place = to + (o + k) * out.stride_o;
            if (out.stride_i == 1) {
              _mm512_mask_storeu_ps(place, mask, x);
            } else {
              _mm512_mask_i32scatter_ps(place, mask, places, x, 4);
            }
          }
        }
      }
    }
  }
  return _mm512_cmp_ps_mask(bad, bad, _CMP_UNORD_Q) == 0;
}

template <typename T>
bool amx_gradient(const AmxGradientArgs& args, const AmxGradientBlock& b,
                  const AmxGradientLayout& l, const AmxGradientScratch& scratch, float* sums,
                  bool add, const WinogradKernelGradient* out) {
  constexpr int kParts = kAmxPartsOf<T>;
  const ConvArgs& c = args.conv;
  amx_input_offsets(c, b, l, scratch.offsets);
  const T* input = static_cast<const T*>(c.input);
  if (c.in_mean != nullptr) {
    amx_gradient_left<true>(c, b, l, scratch.offsets, input, scratch.left);
  } else {
    amx_gradient_left<false>(c, b, l, scratch.offsets, input, scratch.left);
  }
  amx_gradient_offsets(c, b, l, scratch.offsets);
  if (args.z != nullptr) {
    amx_gradient_right<T, true>(args, b, l, scratch.offsets, scratch.right);
  } else {
    amx_gradient_right<T, false>(args, b, l, scratch.offsets, scratch.right);
  }

  const AmxConfig config;
  _tile_loadconfig(&config);
  const int64_t left_panels = amx_ceil_div(b.ci1 - b.ci0, kAmxPanel);
  const int64_t right_panels = amx_ceil_div(b.co1 - b.co0, kAmxPanel);
  constexpr int64_t numbers = kParts * kAmxPanel;  // of a panel's pixel
  const bool left_outside = left_panels >= right_panels || l.phases * l.variants > 1;
  const int64_t taps = c.kh * c.kw;
  bool finite = true;
  alignas(64) float tiles[kAmxSumFloats];
  for (int64_t task = 0; task < left_panels * right_panels; ++task) {
    const int64_t i = left_outside ? task / right_panels : task % left_panels;
    const int64_t o = left_outside ? task % right_panels : task / left_panels;
    const bool two_left = b.ci1 - b.ci0 - i * kAmxPanel > 16;
    const bool two_right = b.co1 - b.co0 - o * kAmxPanel > 16;
    const AmxProductsFn products = two_left ? (two_right ? amx_gradient_products<kParts, 2, 2>
                                                         : amx_gradient_products<kParts, 2, 1>)
                                            : (two_right ? amx_gradient_products<kParts, 1, 2>
                                                         : amx_gradient_products<kParts, 1, 1>);
    float* pair = sums + (out != nullptr ? 0 : i * right_panels + o) * taps * kAmxSumFloats;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t kh = tap / c.kw, kw = tap % c.kw;
      const AmxRange h = amx_range(b.h0, b.h1, kh, c.stride_h, c.pad_h, c.ih);
      const AmxRange w = amx_range(b.w0, b.w1, kw, c.stride_w, c.pad_w, c.iw);
      float* sum = pair + tap * kAmxSumFloats;
      if (h.begin >= h.end || w.begin >= w.end) {
        for (int64_t k = 0; !add && k < kAmxSumFloats; k += kFloatLanes) store(sum + k, Floats{});
        continue;
      }
      const int64_t first = (w.begin - b.w0) * b.images / kAmxPixels;
      const int64_t last = amx_ceil_div((w.end - b.w0) * b.images, kAmxPixels);
      const AmxRuns runs{.groups = b.groups,
                         .rows = h.end - h.begin,
                         .steps = last - first,
                         .left_group = numbers * l.rows * l.variant_row,
                         .left_row = numbers * l.variant_row,
                         .right_group = numbers * l.gradient_group,
                         .right_row = numbers * l.gradient_row};
      const int64_t list = kw % l.variants * l.phases + kh % l.phases;
      const int64_t row = list * b.groups * l.rows + h.begin - b.h0 + kh / l.phases;
      const int64_t left = row * l.variant_row + kw / l.variants * b.images + first * kAmxPixels;
      const int64_t right = (h.begin - b.h0) * l.gradient_row + first * kAmxPixels;
      products(scratch.left + (i * l.window + left) * numbers,
               scratch.right + (o * l.gradient + right) * numbers, runs, tiles);
      for (int64_t k = 0; k < kAmxSumFloats; k += kFloatLanes) {
        store(sum + k, add ? load(sum + k) + load(tiles + k) : load(tiles + k));
      }
    }
    if (out != nullptr) {
      finite &=
          amx_write(c, pair, b.ci0 + i * kAmxPanel, b.ci1, b.co0 + o * kAmxPanel, b.co1, *out);
    }
  }
  _tile_release();
  return finite;
}

inline bool amx_gradient_end(const ConvArgs& c, const AmxGradientEnd& end,
                             const WinogradKernelGradient& out) {
  const int64_t taps = c.kh * c.kw;
  bool finite = true;
  for (int64_t ci = end.ci0; ci < end.ci1; ci += kAmxPanel) {
    const int64_t i = (ci - end.ci0) / kAmxPanel;
    float* sum = end.sums + (i * end.panels + end.panel) * taps * kAmxSumFloats;
    for (int n = 1; n < end.count; ++n) {
      for (int64_t k = 0; k < taps * kAmxSumFloats; k += kFloatLanes) {
        store(sum + k, load(sum + k) + load(sum + n * end.distance + k));
      }
    }
    finite &= amx_write(c, sum, ci, end.ci1, end.co0, end.co1, out);
  }
  return finite;
}

}  // namespace fastres::cpu::FASTRES_ISA
