// Winograd's minimal filtering along the lines of a stem. F(4,3) meets at 0, +-1/2, +-9/8 and
// infinity, F(4,4) there and at 5/2: of such points those of the least error.

namespace fastres::cpu::FASTRES_ISA {

using StemOdd = WinogradAt<4, 9>;
inline constexpr float kStemPoint = 2.5f;

// The values of an even line, of 7 pixels, at each position. With the factor x - 5/2 taken out of
// them, F(4,4)'s polynomials at the other points are F(4,3)'s.
FASTRES_INLINE void stem_input_even(const Floats* d, Floats* v) {
  using F = StemOdd;
  Floats e[6];
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) e[j] = d[j + 1] - kStemPoint * d[j];
  F::input(e, v);
  v[6] = (F::aa * F::bb) * d[1] - (F::aa + F::bb) * d[3] + d[5];
}

FASTRES_INLINE void stem_output(const Floats* m, Floats* y) {
  StemOdd::output(m, y);
  float power = 1.0f;
#pragma GCC unroll 4
  for (int j = 0; j < kStemTile; ++j) {
    y[j] += power * m[6];
    power *= kStemPoint;
  }
}

FASTRES_INLINE void stem_kernel_even(const Floats* g, Floats* u) {
  using F = StemOdd;
  constexpr float a = F::a, b = F::b, aa = F::aa, bb = F::bb, c = kStemPoint;
  const Floats even_a = g[0] + aa * g[2], odd_a = a * (g[1] + aa * g[3]);
  const Floats even_b = g[0] + bb * g[2], odd_b = b * (g[1] + bb * g[3]);
  u[0] = g[0] * (1 / (aa * bb * -c));
  u[1] = (even_a + odd_a) * (F::near / (a - c));
  u[2] = (even_a - odd_a) * (F::near / (-a - c));
  u[3] = (even_b + odd_b) * (F::far / (b - c));
  u[4] = (even_b - odd_b) * (F::far / (-b - c));
  u[5] = g[3];
  u[6] = (g[0] + c * (g[1] + c * (g[2] + c * g[3]))) * (1 / (c * (c * c - aa) * (c * c - bb)));
}

// The block's input, padded and after the prologue, as [pixel][row][ci]; `row` holds one row.
template <typename T>
void stem_columns(const ConvArgs& args, const StemBlock& block, const StemLayout& layout,
                  float* row, float* columns) {
  const int64_t h0 = block.h0 * args.stride_h - args.pad_h;
  const int64_t w0 = block.tile0 * 2 * kStemTile - args.pad_w;
  for (int64_t r = 0; r < layout.rows; ++r) {
    conv_fill_window<T>(args, block.n, h0 + r, 1, w0, layout.pixels, row);
    // What is copied beyond a pixel's channels is overwritten by the next row's.
    for (int64_t w = 0; w < layout.pixels; ++w) {
      __builtin_memcpy(columns + w * layout.column + r * args.ci, row + w * args.ci,
                       kStemChannels * sizeof(float));
    }
  }
}

inline void stem_transform(const StemLayout& layout, const float* columns, float* tiles) {
  for (int64_t t = 0; t < layout.tiles; ++t) {
    const float* in = columns + t * 2 * kStemTile * layout.column;
    float* out = tiles + t * layout.tile;
    for (int64_t i = 0; i < layout.column; i += kFloatLanes) {
      Floats even[7], odd[6], v[7];
#pragma GCC unroll 7
      for (int j = 0; j < 7; ++j) even[j] = load(in + 2 * j * layout.column + i);
      stem_input_even(even, v);
#pragma GCC unroll 7
      for (int p = 0; p < 7; ++p) store(out + 2 * p * layout.column + i, v[p]);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) odd[j] = load(in + (2 * j + 1) * layout.column + i);
      StemOdd::input(odd, v);
#pragma GCC unroll 6
      for (int p = 0; p < 6; ++p) store(out + (2 * p + 1) * layout.column + i, v[p]);
    }
  }
}

// A tile: its transformed input at the first position, its first output element, and how many of
// its pixels are output.
struct StemPlace {
  const float* input;
  int64_t output;
  int width;
};

// For one vector of channels of `count` tiles: transforms the products back and stores them after
// the epilogue. Returns as winograd_store() does.
template <typename T, bool kAffine, bool kResidual, bool kRelu>
Floats stem_store(const ConvArgs& args, const StemPlace* places, int count, int64_t channel,
                  const float* products, double* sums) {
  const Floats scale = kAffine ? load(args.scale + channel) : Floats{};
  const Floats shift = kAffine ? load(args.shift + channel) : Floats{};
  Floats bad = {};
  alignas(64) float pixels[kConvRows * kStemTile * kFloatLanes];
  int stored = 0;
  for (int m = 0; m < count; ++m) {
    Floats z[kStemPositions], y[kStemTile];
#pragma GCC unroll 7
    for (int p = 0; p < kStemPositions; ++p) {
      z[p] = load(products + (p * kConvRows + m) * kConvColumns);
    }
    stem_output(z, y);
#pragma GCC unroll 4
    for (int j = 0; j < kStemTile; ++j) bad += y[j] * 0.0f;
    const int64_t at = places[m].output + channel;
    T* out = static_cast<T*>(args.output) + at;
    const T* residual = static_cast<const T*>(args.residual) + (kResidual ? at : 0);
    const auto put = [&](int j) FASTRES_LAMBDA_INLINE {
      Floats v = y[j];
      if (kAffine) v = v * scale + shift;
      if (kResidual) v += load(residual + j * args.co);
      if (kRelu) v = relu(v);
      store(out + j * args.co, v, kVecIsLine && args.stream);
    };
    if (places[m].width == kStemTile) {
#pragma GCC unroll 4
      for (int j = 0; j < kStemTile; ++j) put(j);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kStemTile; ++j) {
        if (j < places[m].width) put(j);
      }
    }
    if (sums != nullptr) {
      for (int j = 0; j < places[m].width; ++j) store(pixels + stored++ * kFloatLanes, y[j]);
    }
  }
  if (sums != nullptr) conv_add_sums(pixels, stored, kFloatLanes, sums + channel, args.co);
  return bad;
}

template <typename T>
FASTRES_INLINE auto stem_store_of(const ConvArgs& args) {
  if (args.scale == nullptr) return stem_store<T, false, false, false>;
  if (args.residual == nullptr) {
    return args.relu ? stem_store<T, true, false, true> : stem_store<T, true, false, false>;
  }
  return args.relu ? stem_store<T, true, true, true> : stem_store<T, true, true, false>;
}

template <typename T>
bool stem_block(const ConvArgs& args, const StemBlock& block, float* scratch, double* sums) {
  const int64_t across = block.tile1 - block.tile0;
  const StemLayout layout(block.h1 - block.h0, across, args.kh, args.stride_h, args.ci);
  float* columns = scratch + layout.row_floats(args.ci);
  float* transformed = columns + layout.columns_floats();
  stem_columns<T>(args, block, layout, scratch, columns);
  stem_transform(layout, columns, transformed);

  const int64_t depth = args.kh * args.ci, panel_floats = stem_panel_floats(args.kh, args.ci);
  const int64_t vec_stride = kFloatLanes == kConvPanel ? panel_floats : kFloatLanes;
  const int64_t tiles = across * (block.h1 - block.h0);
  const int64_t groups = (tiles + kConvRows - 1) / kConvRows;
  // The sums over the even and the odd taps apart, which lose less to rounding than one chain.
  const int64_t stretch = min(depth, kWinogradStretch);
  const auto finish = stem_store_of<T>(args);
  alignas(64) float products[kStemPositions * kConvRows * kConvColumns];
  Floats bad = {};
  int64_t first = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int rows = static_cast<int>(tiles / groups + (group < tiles % groups ? 1 : 0));
    StemPlace places[kConvRows];
    for (int m = 0; m < rows; ++m) {
      const int64_t h = (first + m) / across, t = (first + m) % across;
      const int64_t w = (block.tile0 + t) * kStemTile;
      places[m] = {transformed + t * layout.tile + h * args.stride_h * args.ci,
                   ((block.n * args.oh + block.h0 + h) * args.ow + w) * args.co - block.origin,
                   static_cast<int>(min<int64_t>(kStemTile, args.ow - w))};
    }
    for (int64_t c = 0; c < args.co; c += kConvColumns) {
      const int vecs = static_cast<int>(min<int64_t>(kConvColumns, args.co - c) / kFloatLanes);
      const float* kernel = args.weight + c / kConvPanel * panel_floats + c % kConvPanel;
      const ConvTileFn multiply =
          vecs == kConvVecs ? conv_tile_of<kConvVecs>(rows) : conv_tile_of<1>(rows);
      for (int p = 0; p < kStemPositions; ++p, kernel += 2 * depth * kConvPanel) {
        const float* pointers[kConvRows];
        for (int m = 0; m < rows; ++m) pointers[m] = places[m].input + p * 2 * layout.column;
        const int phases = p == kStemPositions - 1 ? 1 : 2;
        multiply(pointers, {phases, depth, layout.column, stretch}, kernel, vec_stride,
                 kPrefetchSteps * kConvPanel, products + p * kConvRows * kConvColumns,
                 kConvColumns);
      }
      for (int v = 0; v < vecs; ++v) {
        bad += finish(args, places, rows, c + v * kFloatLanes, products + v * kFloatLanes, sums);
      }
    }
    first += rows;
  }
  end_stream(args.stream);
  return all_zero(bad);
}

// w.kw is 7; w.co is a multiple of kConvPanel.
inline void stem_pack(const ConvWeight& w, float* packed, int64_t panel0, int64_t panel1) {
  const int64_t depth = w.kh * w.ci;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    float* out = packed + panel * stem_panel_floats(w.kh, w.ci);
    for (int64_t k = 0; k < depth; ++k) {
      const float* in =
          w.data + panel * kConvPanel * w.stride_o + k / w.ci * w.stride_h + k % w.ci * w.stride_i;
      alignas(64) float taps[7][kConvPanel];
      for (int tap = 0; tap < 7; ++tap) {
        for (int o = 0; o < kConvPanel; ++o) taps[tap][o] = in[tap * w.stride_w + o * w.stride_o];
      }
      for (int o = 0; o < kConvPanel; o += kFloatLanes) {
        const Floats even[4] = {load(taps[0] + o), load(taps[2] + o), load(taps[4] + o),
                                load(taps[6] + o)};
        const Floats odd[3] = {load(taps[1] + o), load(taps[3] + o), load(taps[5] + o)};
        Floats u[kStemPositions];
        stem_kernel_even(even, u);
        for (int p = 0; p < 7; ++p) store(out + (2 * p * depth + k) * kConvPanel + o, u[p]);
        StemOdd::kernel(odd, u);
        for (int p = 0; p < 6; ++p) store(out + ((2 * p + 1) * depth + k) * kConvPanel + o, u[p]);
      }
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
