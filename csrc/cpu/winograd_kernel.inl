// Winograd's minimal filtering. The polynomials meet at 0, +-3/4, +-3/2 and infinity for F(4,3),
// whose error is a third of that of the usual 0, +-1, +-2; at 0, +-1 and infinity for F(2,3); at
// +-3/8, +-5/4 and infinity for F(4,2), of such points those of the least error; at 0, 1 and
// infinity for F(2,2).

namespace fastres::cpu::FASTRES_ISA {

// The transform back magnifies what the sums over the channels lose, which short stretches halve.
inline constexpr int64_t kWinogradStretch = 32;

// The channels in about equal stretches.
FASTRES_INLINE ConvDepth winograd_depth(int64_t ci) {
  const int64_t stretches = (ci + kWinogradStretch - 1) / kWinogradStretch;
  return {1, ci, 0, (ci + stretches - 1) / stretches};
}

// From one tile's products to the next tile's.
inline constexpr int64_t kWinogradProductRow = winograd_row(kWinogradPanels * kConvPanel);

// The three transforms of a line; those of a square are its columns' and then its rows'.
template <int O, int S>
struct Winograd;

// F(4,3) at 0, +-A/8, +-B/8 and infinity.
template <int A, int B>
struct WinogradAt {
  static constexpr float a = A / 8.0f, b = B / 8.0f, aa = a * a, bb = b * b;

  FASTRES_INLINE static void input(const Floats* d, Floats* v) {
    const Floats even_a = d[4] - bb * d[2], odd_a = d[3] - bb * d[1];
    const Floats even_b = d[4] - aa * d[2], odd_b = d[3] - aa * d[1];
    v[0] = (aa * bb) * d[0] - (aa + bb) * d[2] + d[4];
    v[1] = even_a + a * odd_a;
    v[2] = even_a - a * odd_a;
    v[3] = even_b + b * odd_b;
    v[4] = even_b - b * odd_b;
    v[5] = (aa * bb) * d[1] - (aa + bb) * d[3] + d[5];
  }

  FASTRES_INLINE static void output(const Floats* m, Floats* y) {
    const Floats even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Floats even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = a * odd_a + b * odd_b;
    y[2] = aa * even_a + bb * even_b;
    y[3] = (a * aa) * odd_a + (b * bb) * odd_b + m[5];
  }

  static constexpr float near = 1 / (2 * aa * (aa - bb)), far = 1 / (2 * bb * (bb - aa));

  FASTRES_INLINE static void kernel(const Floats* g, Floats* u) {
    u[0] = g[0] * (1 / (aa * bb));
    const Floats even_a = (g[0] + aa * g[2]) * near, odd_a = g[1] * (a * near);
    const Floats even_b = (g[0] + bb * g[2]) * far, odd_b = g[1] * (b * far);
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = g[2];
  }

  // The transposes of `output` and of `kernel`, for the gradient of the kernels.
  FASTRES_INLINE static void output_transposed(const Floats* y, Floats* m) {
    const Floats even_a = y[0] + aa * y[2], odd_a = a * y[1] + (a * aa) * y[3];
    const Floats even_b = y[0] + bb * y[2], odd_b = b * y[1] + (b * bb) * y[3];
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }

  FASTRES_INLINE static void kernel_transposed(const Floats* u, Floats* g) {
    const Floats even_a = (u[1] + u[2]) * near, even_b = (u[3] + u[4]) * far;
    g[0] = u[0] * (1 / (aa * bb)) + even_a + even_b;
    g[1] = (u[1] - u[2]) * (a * near) + (u[3] - u[4]) * (b * far);
    g[2] = aa * even_a + bb * even_b + u[5];
  }
};

template <>
struct Winograd<4, 1> : WinogradAt<6, 12> {};

template <>
struct Winograd<2, 1> {
  FASTRES_INLINE static void input(const Floats* d, Floats* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }

  FASTRES_INLINE static void output(const Floats* m, Floats* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }

  FASTRES_INLINE static void kernel(const Floats* g, Floats* u) {
    const Floats even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    u[0] = g[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = g[2];
  }
};

template <>
struct Winograd<4, 2> {
  static constexpr float a = 0.375f, b = 1.25f, aa = a * a, bb = b * b;

  FASTRES_INLINE static void input(const Floats* d, Floats* v) {
    const Floats even_a = d[6] - bb * d[2], odd_a = d[4] - bb * d[0];
    const Floats even_b = d[6] - aa * d[2], odd_b = d[4] - aa * d[0];
    v[0] = even_a + a * odd_a;
    v[1] = even_a - a * odd_a;
    v[2] = even_b + b * odd_b;
    v[3] = even_b - b * odd_b;
    v[4] = (aa * bb) * d[0] - (aa + bb) * d[4] + d[8];
    v[5] = d[1];
    v[6] = d[3];
    v[7] = d[5];
    v[8] = d[7];
  }

  FASTRES_INLINE static void output(const Floats* m, Floats* y) {
    const Floats even_a = m[0] + m[1], odd_a = m[0] - m[1];
    const Floats even_b = m[2] + m[3], odd_b = m[2] - m[3];
    y[0] = m[5] + even_a + even_b;
    y[1] = m[6] + a * odd_a + b * odd_b;
    y[2] = m[7] + aa * even_a + bb * even_b;
    y[3] = m[8] + (a * aa) * odd_a + (b * bb) * odd_b + m[4];
  }

  static constexpr float near = 1 / (2 * a * (aa - bb)), far = 1 / (2 * b * (bb - aa));

  FASTRES_INLINE static void kernel(const Floats* g, Floats* u) {
    u[0] = near * g[0] + (a * near) * g[2];
    u[1] = (a * near) * g[2] - near * g[0];
    u[2] = far * g[0] + (b * far) * g[2];
    u[3] = (b * far) * g[2] - far * g[0];
    u[4] = g[2];
    u[5] = g[1];
  }
};

template <>
struct Winograd<2, 2> {
  FASTRES_INLINE static void input(const Floats* d, Floats* v) {
    v[0] = d[0] - d[2];
    v[1] = d[2];
    v[2] = d[4] - d[2];
    v[3] = d[1];
    v[4] = d[3];
  }

  FASTRES_INLINE static void output(const Floats* m, Floats* y) {
    y[0] = m[0] + m[1] + m[3];
    y[1] = m[1] + m[2] + m[4];
  }

  FASTRES_INLINE static void kernel(const Floats* g, Floats* u) {
    u[0] = g[0];
    u[1] = g[0] + g[2];
    u[2] = g[2];
    u[3] = g[1];
  }
};

// The place of a tile: its image and its first output pixel, and how much of it is output.
struct WinogradPlace {
  int64_t n, h, w;
  int height, width;
};

template <int O>
FASTRES_INLINE WinogradPlace winograd_place(const ConvArgs& args, int64_t tile) {
  const int64_t across = (args.ow + O - 1) / O, down = (args.oh + O - 1) / O;
  const int64_t w = tile % across * O, h = tile / across % down * O;
  return {.n = tile / across / down,
          .h = h,
          .w = w,
          .height = static_cast<int>(min<int64_t>(O, args.oh - h)),
          .width = static_cast<int>(min<int64_t>(O, args.ow - w))};
}

// Rows of a buffer of patches or products, at first those before a block's first tile. Positions
// that share kernels share rows too: those of a tile are one after the other, as many as the tile
// has lines, columns or pixels.
struct WinogradRows {
  int64_t count[2][2] = {};  // [odd lines][odd columns]

  FASTRES_INLINE void pass(const WinogradPlace& place) {
    count[0][0] += 1;
    count[0][1] += place.width;
    count[1][0] += place.height;
    count[1][1] += place.height * place.width;
  }
};

// What a line's positions of F(O,3) with stride S are.
template <int O, int S>
struct WinogradLine {
  static constexpr int kCount = winograd_patch(O, S);
  static constexpr int kKernels = O + 2;

  static constexpr bool odd(int i) { return S == 2 && i > O; }
  static constexpr int pixel(int i) { return odd(i) ? i - O - 1 : 0; }

  // Where the rows of a pair of kernels begin, in units of a position's room.
  static constexpr int room(int i, int j) {
    return odd(i) ? (O + 1) * kCount + O * min(j, O + 1) : i * kCount + min(j, kKernels - 1);
  }
};

// Which of a tile's lines or columns, from `first` on, lie within [0, size).
template <int P>
FASTRES_INLINE unsigned winograd_inside(int64_t first, int64_t size) {
  unsigned inside = 0;
  for (int i = 0; i < P; ++i) inside |= (first + i >= 0 && first + i < size ? 1u : 0u) << i;
  return inside;
}

// Transforms the patch whose first pixel is at `in`, for one vector of channels: gives the value at
// each line and column of positions to `put`.
template <typename T, int O, int S, bool kWhole, bool kPrologue, typename Put>
FASTRES_INLINE void winograd_transform(const ConvArgs& args, const T* in, unsigned lines,
                                       unsigned columns, int64_t channel, const Put& put) {
  using Line = WinogradLine<O, S>;
  constexpr int P = Line::kCount;
  Floats mean, scale, bias;
  if (kPrologue) {
    mean = load(args.in_mean + channel);
    scale = load(args.in_scale + channel);
    bias = load(args.in_bias + channel);
  }
  Floats half[P][P];  // transformed along the lines
#pragma GCC unroll 9
  for (int i = 0; i < P; ++i) {
    const T* line = in + i * args.input_stride_h + channel;
    Floats d[P];
#pragma GCC unroll 9
    for (int j = 0; j < P; ++j) {
      if (kWhole || ((lines >> i & columns >> j) & 1) != 0) {
        d[j] = load(line + j * args.input_stride_w);
        if (kPrologue) d[j] = relu((d[j] - mean) * scale + bias);
      } else {
        d[j] = Floats{};
      }
    }
    Winograd<O, S>::input(d, half[i]);
    if (S == 2 && i % 2 != 0) {  // a line of odd pixels, which stays as it is
#pragma GCC unroll 9
      for (int j = 0; j < P; ++j) put(O + 1 + i / 2, j, half[i][j]);
    }
  }
#pragma GCC unroll 9
  for (int j = 0; j < P; ++j) {
    Floats d[P], out[P];
#pragma GCC unroll 9
    for (int i = 0; i < P; ++i) d[i] = half[i][j];
    Winograd<O, S>::input(d, out);
#pragma GCC unroll 9
    for (int i = 0; i < P; ++i) {
      if (!Line::odd(i)) put(i, j, out[i]);
    }
  }
}

// Where pixel (line, column) at position (i, j) of the tile after `rows`, which is `width` pixels
// wide, is in a buffer.
template <int O, int S>
FASTRES_INLINE int64_t winograd_at(int i, int j, int line, int column, const WinogradRows& rows,
                                   int width, int64_t row, int64_t stride) {
  using Line = WinogradLine<O, S>;
  const int64_t first = rows.count[Line::odd(i)][Line::odd(j)];
  return Line::room(i, j) * stride + (first + line * (Line::odd(j) ? width : 1) + column) * row;
}

// What a block asks for while it multiplies.
struct WinogradAhead {
  Prefetch input;     // of the next block
  Prefetch residual;  // of this one

  FASTRES_INLINE void part(int64_t i, int64_t parts) const {
    input.part(i, parts);
    residual.part(i, parts);
  }
};

// Patches and products as floats. Its members are what winograd_block() needs of a form.
template <int O, int S>
struct WinogradFloats {
  using Line = WinogradLine<O, S>;
  int64_t row, stride;     // of patches: from a row, a position to the next
  int64_t product_stride;  // of products: from a position to the next

  WinogradFloats(int64_t tiles, int64_t ci)
      : row(winograd_row(ci)),
        stride(winograd_stride(tiles * row)),
        product_stride(winograd_stride(tiles * kWinogradProductRow)) {}

  // The patch of the tile after `rows` for all channels into v.
  template <typename T, bool kWhole, bool kPrologue>
  __attribute__((noinline)) static void patch(const WinogradFloats& to, const ConvArgs& args,
                                              const T* in, unsigned lines, unsigned columns,
                                              const WinogradRows& rows, const WinogradPlace& place,
                                              float* v) {
    const WinogradRows before = rows;
    const int height = kWhole ? O : place.height, width = kWhole ? O : place.width;
    for (int64_t c = 0; c < args.ci; c += kFloatLanes) {
      winograd_transform<T, O, S, kWhole, kPrologue>(
          args, in, lines, columns, c, [&](int i, int j, Floats x) FASTRES_LAMBDA_INLINE {
            const int line = Line::pixel(i), column = Line::pixel(j);
            if (line >= height || column >= width) return;
            const int64_t at =
                winograd_at<O, S>(i, j, line, column, before, width, to.row, to.stride);
            store(v + at + c, x);
          });
    }
  }

  // products[position][row][channel] for panels [panel0, panel1). Asks for some of what comes next.
  void multiply(const ConvArgs& args, const WinogradRows& rows, int64_t panel0, int64_t panel1,
                const WinogradScratch& scratch, const WinogradAhead& ahead_of) const {
    constexpr int K = Line::kKernels;
    const int64_t all_panels = (args.co + kConvPanel - 1) / kConvPanel;
    const int64_t panel_floats = winograd_panel_floats(O, args.ci);
    const int64_t vec_stride = kFloatLanes == kConvPanel ? panel_floats : kFloatLanes;
    const int64_t channels = (panel1 - panel0) * kConvPanel;
    for (int pair = 0; pair < K * K; ++pair) {
      const int i = pair / K, j = pair % K;
      const int64_t count = rows.count[Line::odd(i)][Line::odd(j)];
      const int64_t groups = (count + kConvRows - 1) / kConvRows;
      const float* patches = scratch.patches + Line::room(i, j) * stride;
      float* products = scratch.products + Line::room(i, j) * product_stride;
      const float* kernels =
          args.weight + panel0 * panel_floats + pair * winograd_stride(args.ci * kConvPanel);
      for (int64_t c = 0; c < channels; c += kConvColumns) {
        ahead_of.input.part((panel0 * kConvPanel * K * K + pair * channels + c) / kConvColumns,
                            all_panels * kConvPanel * K * K / kConvColumns);
        const float* kernel = kernels + c / kConvPanel * panel_floats + c % kConvPanel;
        const bool both = channels - c >= kConvColumns;
        const float* next = c + kConvColumns < channels
                                ? kernel + kConvColumns / kConvPanel * panel_floats
                                : kernels + winograd_stride(args.ci * kConvPanel);
        int64_t first = 0;
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t ahead = group < groups - 1 ? 0 : next - kernel;
          const int height = static_cast<int>(count / groups + (group < count % groups ? 1 : 0));
          const float* pointers[kConvRows];
          for (int m = 0; m < height; ++m) pointers[m] = patches + (first + m) * row;
          const ConvTileFn compute =
              both ? conv_tile_of<kConvVecs>(height) : conv_tile_of<1>(height);
          compute(pointers, winograd_depth(args.ci), kernel, vec_stride, ahead,
                  products + first * kWinogradProductRow + c, kWinogradProductRow);
          first += height;
        }
      }
    }
  }
};

// Transforms one vector of the products of the tile after `rows` to its O x O pixels, one after the
// other. Those that are not output are made of products of those that are.
template <int O, int S>
FASTRES_INLINE void winograd_pixels(const float* products, int64_t stride, const WinogradRows& rows,
                                    const WinogradPlace& place, Floats* y) {
  using Line = WinogradLine<O, S>;
  constexpr int P = Line::kCount;
  const auto inside = [](int pixel, int size)
                          FASTRES_LAMBDA_INLINE { return pixel == 0 ? 0 : min(pixel, size - 1); };
  Floats half[O][P];
#pragma GCC unroll 9
  for (int j = 0; j < P; ++j) {
    Floats m[P], out[O];
#pragma GCC unroll 9
    for (int i = 0; i < P; ++i) {
      const int line = inside(Line::pixel(i), place.height);
      const int column = inside(Line::pixel(j), place.width);
      m[i] = load(products + winograd_at<O, S>(i, j, line, column, rows, place.width,
                                               kWinogradProductRow, stride));
    }
    Winograd<O, S>::output(m, out);
#pragma GCC unroll 4
    for (int i = 0; i < O; ++i) half[i][j] = out[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < O; ++i) Winograd<O, S>::output(half[i], y + i * O);
}

// The patches of tiles [tile0, tile1), in the form of `to`; returns their rows.
template <typename T, int O, int S, typename Form>
WinogradRows winograd_patches(const ConvArgs& args, int64_t tile0, int64_t tile1, const Form& to,
                              float* patches) {
  constexpr int P = winograd_patch(O, S);
  constexpr unsigned all = (1u << P) - 1;
  WinogradRows rows;
  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const WinogradPlace place = winograd_place<O>(args, tile);
    const int64_t h = place.h * S - args.pad_h, w = place.w * S - args.pad_w;
    const unsigned lines = winograd_inside<P>(h, args.ih);
    const unsigned columns = winograd_inside<P>(w, args.iw);
    const T* in = static_cast<const T*>(args.input) + place.n * args.input_stride_n +
                  h * args.input_stride_h + w * args.input_stride_w;
    const bool whole = lines == all && columns == all;  // so that all of the tile is output, too
    const auto transform =
        args.in_mean != nullptr
            ? (whole ? Form::template patch<T, true, true> : Form::template patch<T, false, true>)
            : (whole ? Form::template patch<T, true, false>
                     : Form::template patch<T, false, false>);
    transform(to, args, in, lines, columns, rows, place, patches);
    rows.pass(place);
  }
  return rows;
}

// Transforms the products of channels [channel, channel + channels) back and stores them after the
// epilogue. Returns 0 in every lane, or what is not finite there.
template <typename T, int O, int S, bool kAffine, bool kResidual, bool kRelu>
Floats winograd_store(const ConvArgs& args, const WinogradBlock& block, int64_t channel,
                      int64_t channels, const float* products, int64_t stride, double* sums) {
  const int64_t plane = (args.co + kConvPanel - 1) / kConvPanel * kConvPanel;
  Floats bad = {};
  alignas(64) float pixels[O * O * kFloatLanes];
  WinogradRows rows;
  for (int64_t tile = block.tile0; tile < block.tile1; ++tile) {
    const WinogradPlace place = winograd_place<O>(args, tile);
    const bool whole = place.height == O && place.width == O;
    const int64_t first = ((place.n * args.oh + place.h) * args.ow + place.w) * args.co + channel;
    // All of a pixel's channels, which follow each other in memory, before the next tile's.
    for (int64_t c = 0; c < channels; c += kFloatLanes) {
      Floats y[O * O];
      winograd_pixels<O, S>(products + c, stride, rows, place, y);
#pragma GCC unroll 16
      for (int i = 0; i < O * O; ++i) bad += y[i] * 0.0f;
      const Floats scale = kAffine ? load(args.scale + channel + c) : Floats{};
      const Floats shift = kAffine ? load(args.shift + channel + c) : Floats{};
      const int64_t at = first + c;
      T* out = static_cast<T*>(args.output) + at;
      const T* residual = static_cast<const T*>(args.residual) + (kResidual ? at : 0);
      const auto put = [&](int i, int j) FASTRES_LAMBDA_INLINE {
        const int64_t pixel = (i * args.ow + j) * args.co;
        Floats v = y[i * O + j];
        if (kAffine) v = v * scale + shift;
        if (kResidual) v += load(residual + pixel);
        if (kRelu) v = relu(v);
        store(out + pixel, v, kVecIsLine && args.stream);
      };
      if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < O * O; ++i) put(i / O, i % O);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < O; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < O; ++j) {
            if (i < place.height && j < place.width) put(i, j);
          }
        }
      }
      if (sums != nullptr) {
        int count = 0;
        for (int i = 0; i < place.height; ++i) {
          for (int j = 0; j < place.width; ++j) store(pixels + count++ * kFloatLanes, y[i * O + j]);
        }
        conv_add_sums(pixels, count, kFloatLanes, sums + channel + c, plane);
      }
    }
    rows.pass(place);
  }
  return bad;
}

template <typename T, int O, int S>
FASTRES_INLINE auto winograd_store_of(const ConvArgs& args) {
  if (args.scale == nullptr) return winograd_store<T, O, S, false, false, false>;
  if (args.residual == nullptr) {
    return args.relu ? winograd_store<T, O, S, true, false, true>
                     : winograd_store<T, O, S, true, false, false>;
  }
  return args.relu ? winograd_store<T, O, S, true, true, true>
                   : winograd_store<T, O, S, true, true, false>;
}

// The input of the next block, in whole lines, if these are next to each other.
template <typename T, int O, int S>
FASTRES_INLINE Prefetch winograd_next_input(const ConvArgs& args, const WinogradBlock& block) {
  const int64_t tiles = args.n * ((args.oh + O - 1) / O) * ((args.ow + O - 1) / O);
  const auto line = [&](int64_t tile) {
    const WinogradPlace place = winograd_place<O>(args, min(tile, tiles - 1));
    return static_cast<const T*>(args.input) + place.n * args.input_stride_n +
           min(place.h * S + (place.w > 0 ? O * S : 0), args.ih - 1) * args.input_stride_h;
  };
  const bool dense = args.input_stride_w == args.ci && args.input_stride_h == args.iw * args.ci &&
                     args.input_stride_n == args.ih * args.input_stride_h;
  const auto* begin = reinterpret_cast<const char*>(line(block.tile1));
  const auto* end = reinterpret_cast<const char*>(line(2 * block.tile1 - block.tile0));
  return {begin, dense ? end - begin : 0};
}

// The residual of the block, in whole lines.
template <typename T, int O>
FASTRES_INLINE Prefetch winograd_residual(const ConvArgs& args, const WinogradBlock& block) {
  if (args.residual == nullptr) return {};
  const WinogradPlace first = winograd_place<O>(args, block.tile0);
  const WinogradPlace last = winograd_place<O>(args, block.tile1 - 1);
  const int64_t line = args.ow * args.co;
  const auto* begin = static_cast<const T*>(args.residual) + (first.n * args.oh + first.h) * line;
  const auto* end =
      static_cast<const T*>(args.residual) + (last.n * args.oh + last.h + last.height) * line;
  return {reinterpret_cast<const char*>(begin),
          reinterpret_cast<const char*>(end) - reinterpret_cast<const char*>(begin)};
}

template <typename T, int O, int S, typename Form>
bool winograd_block(const ConvArgs& args, const WinogradBlock& block,
                    const WinogradScratch& scratch, double* sums) {
  const int64_t tiles = block.tile1 - block.tile0;
  const Form form(tiles, args.ci);
  const WinogradRows rows =
      winograd_patches<T, O, S>(args, block.tile0, block.tile1, form, scratch.patches);
  const WinogradAhead ahead = {winograd_next_input<T, O, S>(args, block),
                               winograd_residual<T, O>(args, block)};
  const auto finish = winograd_store_of<T, O, S>(args);
  Floats bad = {};
  for (int64_t panel = block.panel0; panel < block.panel1; panel += kWinogradPanels) {
    const int64_t end = min(panel + kWinogradPanels, block.panel1);
    form.multiply(args, rows, panel, end, scratch, ahead);
    bad += finish(args, block, panel * kConvPanel, (end - panel) * kConvPanel, scratch.products,
                  form.product_stride, sums);
  }
  end_stream(args.stream);
  return all_zero(bad);
}

// Transforms the tile of the gradient at `in`, of which height x width pixels exist, for `channels`
// channels into w, at every position.
template <typename T>
void winograd_spread(const T* in, int64_t line, int64_t pixel, int height, int width,
                     int64_t channels, float* w, int64_t stride) {
  for (int64_t c = 0; c < channels; c += kFloatLanes) {
    Floats half[4][6];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Floats y[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        y[j] = i < height && j < width ? load(in + i * line + j * pixel + c) : Floats{};
      }
      Winograd<4, 1>::output_transposed(y, half[i]);
    }
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
      const Floats y[4] = {half[0][j], half[1][j], half[2][j], half[3][j]};
      Floats out[6];
      Winograd<4, 1>::output_transposed(y, out);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) store(w + (i * 6 + j) * stride + c, out[i]);
    }
  }
}

// sums[m][v] += sum over tiles of v[tile][m] * w[tile][v].
template <int M, int V>
__attribute__((noinline)) void winograd_outer(const float* v, int64_t v_row, const float* w,
                                              int64_t w_row, int64_t tiles, float* sums,
                                              int64_t sums_row) {
  Floats part[M][V] = {};
  for (int64_t t = 0; t < tiles; ++t, v += v_row, w += w_row) {
    Floats b[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) b[i] = load(w + i * kFloatLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Floats x = splat(v[m]);
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) part[m][i] += x * b[i];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      float* total = sums + m * sums_row + i * kFloatLanes;
      store(total, load(total) + part[m][i]);
    }
  }
}

using WinogradOuterFn = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*,
                                 int64_t);

template <int V>
FASTRES_INLINE WinogradOuterFn winograd_outer_of(int rows) {
#define FASTRES_OUTER(m) winograd_outer<m, V>
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr WinogradOuterFn table[] = {
      nullptr,           FASTRES_OUTER(1),  FASTRES_OUTER(2), FASTRES_OUTER(3), FASTRES_OUTER(4),
      FASTRES_OUTER(5),  FASTRES_OUTER(6),  FASTRES_OUTER(7), FASTRES_OUTER(8), FASTRES_OUTER(9),
      FASTRES_OUTER(10), FASTRES_OUTER(11), FASTRES_OUTER(12)};
#elif defined(__AVX2__)
  static constexpr WinogradOuterFn table[] = {nullptr,          FASTRES_OUTER(1), FASTRES_OUTER(2),
                                              FASTRES_OUTER(3), FASTRES_OUTER(4), FASTRES_OUTER(5),
                                              FASTRES_OUTER(6)};
#else
  static constexpr WinogradOuterFn table[] = {nullptr, FASTRES_OUTER(1), FASTRES_OUTER(2),
                                              FASTRES_OUTER(3), FASTRES_OUTER(4)};
#endif
#undef FASTRES_OUTER
  return table[rows];
}

template <typename T>
void winograd_gradient(const WinogradGradientArgs& args, const WinogradGradientBlock& block,
                       float* scratch, float* sums) {
  constexpr int64_t stride = kWinogradGradientStride;
  constexpr int64_t row = winograd_row(kWinogradGradientChannels);
  const WinogradFloats<4, 1> form(kWinogradGradientTiles, kWinogradGradientChannels);
  float* patches = scratch;
  float* spread = scratch + 36 * stride;
  const int64_t rows = block.ci1 - block.ci0, columns = block.co1 - block.co0;
  // The patches' transform sees the block's channels only.
  ConvArgs conv = args.conv;
  conv.input = static_cast<const T*>(conv.input) + block.ci0;
  conv.ci = rows;
  if (conv.in_mean != nullptr) {
    conv.in_mean += block.ci0;
    conv.in_scale += block.ci0;
    conv.in_bias += block.ci0;
  }
  const int64_t groups = (rows + kConvRows - 1) / kConvRows;
  for (int64_t tile = block.tile0; tile < block.tile1; tile += kWinogradGradientTiles) {
    const int64_t end = min(tile + kWinogradGradientTiles, block.tile1);
    winograd_patches<T, 4, 1>(conv, tile, end, form, patches);
    for (int64_t t = tile; t < end; ++t) {
      const WinogradPlace place = winograd_place<4>(conv, t);
      const T* in = static_cast<const T*>(args.gradient) +
                    ((place.n * conv.oh + place.h) * conv.ow + place.w) * conv.co + block.co0;
      winograd_spread<T>(in, conv.ow * conv.co, conv.co, place.height, place.width, columns,
                         spread + (t - tile) * row, stride);
    }
    for (int position = 0; position < 36; ++position) {
      for (int64_t c = 0; c < columns; c += kConvColumns) {
        const bool both = columns - c >= kConvColumns;
        int64_t m = 0;
        for (int64_t group = 0; group < groups; ++group) {
          const int count = static_cast<int>(rows / groups + (group < rows % groups ? 1 : 0));
          const WinogradOuterFn multiply =
              both ? winograd_outer_of<kConvVecs>(count) : winograd_outer_of<1>(count);
          multiply(patches + position * stride + m, row, spread + position * stride + c, row,
                   end - tile, sums + position * kWinogradSumStride + m * row + c, row);
          m += count;
        }
      }
    }
  }
}

inline bool winograd_gradient_end(const WinogradGradientBlock& block, const float* sums, int count,
                                  const WinogradKernelGradient& out) {
  constexpr int64_t row = winograd_row(kWinogradGradientChannels);
  Floats bad = {};
  for (int64_t i = 0; i < block.ci1 - block.ci0; ++i) {
    for (int64_t o = 0; o < block.co1 - block.co0; o += kFloatLanes) {
      Floats half[3][6];
#pragma GCC unroll 6
      for (int k = 0; k < 6; ++k) {
        Floats u[6], g[3];
#pragma GCC unroll 6
        for (int h = 0; h < 6; ++h) {
          const float* sum = sums + (h * 6 + k) * kWinogradSumStride + i * row + o;
          u[h] = load(sum);
          for (int n = 1; n < count; ++n) u[h] += load(sum + n * kWinogradSumFloats);
        }
        Winograd<4, 1>::kernel_transposed(u, g);
#pragma GCC unroll 3
        for (int h = 0; h < 3; ++h) half[h][k] = g[h];
      }
      alignas(64) float taps[9][kFloatLanes];
#pragma GCC unroll 3
      for (int h = 0; h < 3; ++h) {
        Floats g[3];
        Winograd<4, 1>::kernel_transposed(half[h], g);
#pragma GCC unroll 3
        for (int w = 0; w < 3; ++w) {
          bad += g[w] * 0.0f;
          store(taps[h * 3 + w], g[w]);
        }
      }
      float* to = out.data + (block.ci0 + i) * out.stride_i + (block.co0 + o) * out.stride_o;
      for (int lane = 0; lane < kFloatLanes; ++lane, to += out.stride_o) {
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) {
          to[tap / 3 * out.stride_h + tap % 3 * out.stride_w] = taps[tap][lane];
        }
      }
    }
  }
  return all_zero(bad);
}

// Transforms the kernels from input channel `i` to output channels [o, o + kFloatLanes): gives the
// value at each line and column of kernels to `put`.
template <int O, int S, typename Put>
FASTRES_INLINE void winograd_kernels(const ConvWeight& w, int64_t i, int64_t o, const Put& put) {
  constexpr int P = O + 2;
  alignas(64) float taps[9][kFloatLanes];
  for (int lane = 0; lane < kFloatLanes; ++lane) {
    const float* kernel = w.data + (o + lane) * w.stride_o + i * w.stride_i;
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
      taps[tap][lane] = kernel[tap / 3 * w.stride_h + tap % 3 * w.stride_w];
    }
  }
  Floats half[3][P];
#pragma GCC unroll 3
  for (int h = 0; h < 3; ++h) {
    const Floats g[3] = {load(taps[3 * h]), load(taps[3 * h + 1]), load(taps[3 * h + 2])};
    Winograd<O, S>::kernel(g, half[h]);
  }
#pragma GCC unroll 6
  for (int j = 0; j < P; ++j) {
    const Floats g[3] = {half[0][j], half[1][j], half[2][j]};
    Floats u[P];
    Winograd<O, S>::kernel(g, u);
#pragma GCC unroll 6
    for (int k = 0; k < P; ++k) put(k, j, u[k]);
  }
}

// w.kh and w.kw are 3; w.co and w.ci are multiples of kConvPanel.
template <int O, int S>
void winograd_pack(const ConvWeight& w, float* packed, int64_t panel0, int64_t panel1) {
  constexpr int P = O + 2;
  const int64_t stride = winograd_stride(w.ci * kConvPanel);
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    float* out = packed + panel * winograd_panel_floats(O, w.ci);
    for (int64_t i = 0; i < w.ci; ++i) {
      for (int64_t o = 0; o < kConvPanel; o += kFloatLanes) {
        winograd_kernels<O, S>(w, i, panel * kConvPanel + o,
                               [&](int k, int j, Floats u) FASTRES_LAMBDA_INLINE {
                                 store(out + (k * P + j) * stride + i * kConvPanel + o, u);
                               });
      }
    }
    for (int position = 0; position < P * P; ++position) {
      conv_zero(out + position * stride + w.ci * kConvPanel, stride - w.ci * kConvPanel);
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
