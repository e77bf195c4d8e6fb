// Convolution as an implicit GEMM: a register tile of kConvRows output pixels by kConvVecs vectors
// of output channels, its left operand read through one pointer a pixel.

namespace fastres::cpu::FASTRES_ISA {

inline void conv_fold(const ConvNorm& norm, int64_t channels, float* scale, float* shift) {
  for (int64_t first = 0; first < channels; first += kConvPanel) {
    const int64_t count = min<int64_t>(channels - first, kConvPanel);
    const auto read = [&](const float* from, double missing, double* to) FASTRES_LAMBDA_INLINE {
      for (int i = 0; i < kConvPanel; ++i) to[i] = missing;
      for (int i = 0; from != nullptr && i < count; ++i) to[i] = from[first + i];
    };
    double bias[kConvPanel], mean[kConvPanel], var[kConvPanel], weight[kConvPanel];
    double sum[kConvPanel];
    read(norm.bias, 0.0, bias);
    read(norm.mean, 0.0, mean);
    read(norm.var, 0.0, var);
    read(norm.bn_weight, 1.0, weight);
    read(norm.bn_bias, 0.0, sum);
    for (int i = 0; i < kConvPanel; ++i) {
      weight[i] *= 1.0 / __builtin_sqrt(var[i] + norm.eps);
      sum[i] += (bias[i] - mean[i]) * weight[i];
    }
    for (int i = 0; i < kConvPanel; ++i) {
      scale[first + i] = i < count ? static_cast<float>(weight[i]) : 0.0f;
      shift[first + i] = i < count ? static_cast<float>(sum[i]) : 0.0f;
    }
  }
}

#if defined(__AVX512F__)
inline constexpr int kConvRows = 12;
#elif defined(__AVX2__)
inline constexpr int kConvRows = 6;
#elif defined(__aarch64__)
inline constexpr int kConvRows = 12;
#else
inline constexpr int kConvRows = 4;
#endif
inline constexpr int kConvVecs = 2;
// Weights come from beyond the second level cache, in an order that page ends hide from the
// hardware's prefetcher. Those of the next columns, if they are no more than so many bytes, are
// asked for while the last pixels are multiplied with the ones before; else, so many steps ahead.
inline constexpr int64_t kAheadBytes = 256 * 1024;
inline constexpr int64_t kPrefetchSteps = 64;
inline constexpr int kConvColumns = kConvVecs * kFloatLanes;
// Weights that stay in the second level cache while pixels pass by.
inline constexpr int64_t kWeightBytes = 256 * 1024;
// Sums are taken over stretches of the depth and then added up: one long chain of additions would
// lose more to rounding than torch does.
inline constexpr int64_t kConvStretch = 256;

// Sums over `segments` parts of the row pointers, `length` floats each and `jump` apart, taken in
// stretches of `stretch` floats.
struct ConvDepth {
  int64_t segments, length, jump;
  int64_t stretch = kConvStretch;
};

// What is asked for little by little, while something else is computed.
struct Prefetch {
  const char* begin;
  int64_t bytes;

  // Part `i` of `parts`.
  FASTRES_INLINE void part(int64_t i, int64_t parts) const {
    const int64_t end = bytes * (i + 1) / parts;
    for (int64_t at = bytes * i / parts; at < end; at += 64) {
      __builtin_prefetch(begin + at, 0, 2);
    }
  }
};

// tile[m * tile_stride + v * lanes] = sum over k of rows[m][k] * weight[v * vec_stride + 16 * k].
// The weights `ahead` after these go to the second level cache.
template <int M, int V>
__attribute__((noinline)) void conv_tile(const float* const* rows, ConvDepth depth,
                                         const float* weight, int64_t vec_stride, int64_t ahead,
                                         float* tile, int64_t tile_stride) {
  Floats sums[M][V] = {};
  bool first = true;
  const auto flush = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* total = tile + m * tile_stride + v * kFloatLanes;
        store(total, first ? sums[m][v] : load(total) + sums[m][v]);
        sums[m][v] = Floats{};
      }
    }
    first = false;
  };
  int64_t left = depth.stretch;
  for (int64_t segment = 0; segment < depth.segments; ++segment) {
    const float* a[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) a[m] = rows[m] + segment * depth.jump;
    for (int64_t k = 0; k < depth.length;) {
      const int64_t end = min(depth.length, k + left);
      left -= end - k;
#pragma GCC unroll 2
      for (; k < end; ++k) {
        Floats b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          if (v == 0 || kFloatLanes == kConvPanel) {  // else one cache line holds all vectors
            __builtin_prefetch(weight + v * vec_stride + ahead, 0, 2);
          }
          b[v] = load(weight + v * vec_stride);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Floats x = splat(a[m][k]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[m][v] += x * b[v];
        }
        weight += kConvPanel;
      }
      if (left == 0) {
        flush();
        left = depth.stretch;
      }
    }
  }
  if (first || left != depth.stretch) flush();
}

using ConvTileFn = void (*)(const float* const*, ConvDepth, const float*, int64_t, int64_t, float*,
                            int64_t);

template <int V, int... M>
struct ConvTiles {
  static constexpr ConvTileFn table[] = {nullptr, conv_tile<M, V>...};
};

template <int V>
FASTRES_INLINE ConvTileFn conv_tile_of(int rows) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return ConvTiles<V, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::table[rows];
#elif defined(__AVX2__)
  return ConvTiles<V, 1, 2, 3, 4, 5, 6>::table[rows];
#else
  return ConvTiles<V, 1, 2, 3, 4>::table[rows];
#endif
}

// Stores V whole vectors of each row of a tile after the epilogue.
template <typename T, int V, bool kAffine, bool kResidual, bool kRelu>
void conv_store(const ConvArgs& args, const float* tile, int rows, const int64_t* offsets,
                int64_t channel) {
  Floats scale[V], shift[V];
  for (int v = 0; v < V; ++v) {
    scale[v] = kAffine ? load(args.scale + channel + v * kFloatLanes) : Floats{};
    shift[v] = kAffine ? load(args.shift + channel + v * kFloatLanes) : Floats{};
  }
  T* output = static_cast<T*>(args.output) + channel;
  const T* residual = static_cast<const T*>(args.residual) + (kResidual ? channel : 0);
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < V; ++v) {
      Floats y = load(tile + m * kConvColumns + v * kFloatLanes);
      if (kAffine) y = y * scale[v] + shift[v];
      if (kResidual) y += load(residual + offsets[m] + v * kFloatLanes);
      if (kRelu) y = relu(y);
      store(output + offsets[m] + v * kFloatLanes, y, args.stream);
    }
  }
}

using ConvStoreFn = void (*)(const ConvArgs&, const float*, int, const int64_t*, int64_t);

template <typename T, int V>
FASTRES_INLINE ConvStoreFn conv_store_of(const ConvArgs& args) {
  if (args.scale == nullptr) return conv_store<T, V, false, false, false>;
  if (args.residual == nullptr) {
    return args.relu ? conv_store<T, V, true, false, true> : conv_store<T, V, true, false, false>;
  }
  return args.relu ? conv_store<T, V, true, true, true> : conv_store<T, V, true, true, false>;
}

// The same for the last, incomplete vector, which holds `count` channels.
template <typename T>
void conv_store_partial(const ConvArgs& args, const float* tile, int rows, const int64_t* offsets,
                        int64_t channel, int count) {
  const bool affine = args.scale != nullptr;
  const Floats scale = affine ? load(args.scale + channel) : Floats{};
  const Floats shift = affine ? load(args.shift + channel) : Floats{};
  for (int m = 0; m < rows; ++m) {
    const int64_t at = offsets[m] + channel;
    Floats y = load(tile + m * kConvColumns);
    if (affine) y = y * scale + shift;
    if (args.residual != nullptr) {
      y += load_partial(static_cast<const T*>(args.residual) + at, count);
    }
    if (args.relu) y = relu(y);
    store_partial(static_cast<T*>(args.output) + at, y, count);
  }
}

// Half h of a vector, as doubles.
FASTRES_INLINE Doubles to_doubles(Floats x, int h) {
  typedef float Half __attribute__((vector_size(kVecBytes / 2)));
  Half half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&x) + h * sizeof(half), sizeof(half));
  return __builtin_convertvector(half, Doubles);
}

// Adds the sums of `rows` >= 1 vectors, `stride` floats apart, to sums[0], sums[plane], sums[2 *
// plane].
FASTRES_INLINE void conv_add_sums(const float* tile, int rows, int64_t stride, double* sums,
                                  int64_t plane) {
  // Several sums at a time: an addition waits for the one before.
  constexpr int kChains = 4;
  Floats sums_of[kChains] = {}, squares_of[kChains] = {};
  int m = 0;
  for (; m + kChains <= rows; m += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sums_of[i] += load(tile + (m + i) * stride);
  }
  for (; m < rows; ++m) sums_of[0] += load(tile + m * stride);
  const Floats sum = (sums_of[0] + sums_of[1]) + (sums_of[2] + sums_of[3]);
  const Floats mean = sum * (1.0f / static_cast<float>(rows));
  const auto add_square = [&](int row, Floats& to) FASTRES_LAMBDA_INLINE {
    const Floats d = load(tile + row * stride) - mean;
    to += d * d;
  };
  for (m = 0; m + kChains <= rows; m += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) add_square(m + i, squares_of[i]);
  }
  for (; m < rows; ++m) add_square(m, squares_of[0]);
  const Floats squares = (squares_of[0] + squares_of[1]) + (squares_of[2] + squares_of[3]);
  // mean is not exactly sum / rows, so that sum * mean comes with what it leaves of the squares.
  for (int h = 0; h < 2; ++h) {
    double* p = sums + h * kDoubleLanes;
    const Doubles s = to_doubles(sum, h), q = to_doubles(mean, h);
    store(p, load(p) + s);
    store(p + plane, load(p + plane) + q * (2.0 * s - static_cast<double>(rows) * q));
    store(p + 2 * plane, load(p + 2 * plane) + to_doubles(squares, h));
  }
}

// `count` consecutive channels after the prologue, as floats.
template <typename T>
FASTRES_INLINE void conv_load(const T* in, int64_t count, const ConvArgs& args, float* out) {
  const bool prologue = args.in_mean != nullptr;
  int64_t c = 0;
  for (; c + kFloatLanes <= count; c += kFloatLanes) {
    Floats x = load(in + c);
    if (prologue) {
      x = relu((x - load(args.in_mean + c)) * load(args.in_scale + c) + load(args.in_bias + c));
    }
    store(out + c, x);
  }
  if (c < count) {
    const int rest = static_cast<int>(count - c);
    Floats x = load_partial(in + c, rest);
    if (prologue) {
      x = relu((x - load(args.in_mean + c)) * load(args.in_scale + c) + load(args.in_bias + c));
    }
    store_partial(out + c, x, rest);
  }
}

FASTRES_INLINE void conv_zero(float* out, int64_t count) {
  if (count > 0) __builtin_memset(out, 0, count * sizeof(float));
}

// Copies input rows [h0, h0 + height) and columns [w0, w0 + width) of image n; both may reach into
// the padding, which becomes zeros.
template <typename T>
void conv_fill_window(const ConvArgs& args, int64_t n, int64_t h0, int64_t height, int64_t w0,
                      int64_t width, float* window) {
  const int64_t left = min(max<int64_t>(-w0, 0), width);
  const int64_t right = max(left, min(width, args.iw - w0));
  for (int64_t r = 0; r < height; ++r, window += width * args.ci) {
    const int64_t h = h0 + r;
    if (h < 0 || h >= args.ih) {
      conv_zero(window, width * args.ci);
      continue;
    }
    const T* row = static_cast<const T*>(args.input) + n * args.input_stride_n +
                   h * args.input_stride_h + w0 * args.input_stride_w;
    conv_zero(window, left * args.ci);
    if (args.in_mean == nullptr && args.input_stride_w == args.ci) {
      conv_load(row + left * args.ci, (right - left) * args.ci, args, window + left * args.ci);
    } else {
      for (int64_t w = left; w < right; ++w) {
        conv_load(row + w * args.input_stride_w, args.ci, args, window + w * args.ci);
      }
    }
    conv_zero(window + right * args.ci, (width - right) * args.ci);
  }
}

template <typename T>
void conv_block(const ConvArgs& args, const ConvBlock& block, const ConvScratch& scratch,
                double* sums) {
  // The input that the block's first pixel starts at, and strides from there.
  const int64_t h0 = block.h0 * args.stride_h - args.pad_h;
  const int64_t w0 = block.w0 * args.stride_w - args.pad_w;
  const float* base;
  int64_t stride_n, stride_h, stride_w;
  if (args.window) {
    const int64_t height = (block.h1 - block.h0 - 1) * args.stride_h + args.kh;
    const int64_t width = (block.w1 - block.w0 - 1) * args.stride_w + args.kw;
    stride_w = args.ci;
    stride_h = width * stride_w;
    stride_n = height * stride_h;
    for (int64_t n = block.n0; n < block.n1; ++n) {
      conv_fill_window<T>(args, n, h0, height, w0, width,
                          scratch.window + (n - block.n0) * stride_n);
    }
    base = scratch.window;
  } else {
    stride_n = args.input_stride_n;
    stride_h = args.input_stride_h;
    stride_w = args.input_stride_w;
    base =
        static_cast<const float*>(args.input) + block.n0 * stride_n + h0 * stride_h + w0 * stride_w;
  }
  int64_t pixels = 0;
  for (int64_t n = block.n0; n < block.n1; ++n) {
    for (int64_t h = block.h0; h < block.h1; ++h) {
      for (int64_t w = block.w0; w < block.w1; ++w, ++pixels) {
        scratch.rows[pixels] = base + (n - block.n0) * stride_n +
                               (h - block.h0) * args.stride_h * stride_h +
                               (w - block.w0) * args.stride_w * stride_w;
        scratch.offsets[pixels] = ((n * args.oh + h) * args.ow + w) * args.co;
      }
    }
  }

  const ConvDepth depth = {args.kh, args.kw * args.ci, stride_h};
  const int64_t panel_floats = args.kh * args.kw * args.ci * kConvPanel;
  const int64_t plane = (args.co + kConvPanel - 1) / kConvPanel * kConvPanel;
  // A panel holds several vectors, or (AVX-512) a vector is a panel.
  const int64_t vec_stride = kFloatLanes == kConvPanel ? panel_floats : kFloatLanes;
  const int64_t tiles = (pixels + kConvRows - 1) / kConvRows;
  const int64_t end = min(block.panel1 * kConvPanel, args.co);
  const ConvStoreFn store_both = conv_store_of<T, kConvVecs>(args);
  const ConvStoreFn store_one = conv_store_of<T, 1>(args);
  alignas(64) float tile[kConvRows * kConvColumns];
  // Where one column's weights are few, several columns at a time: a pixel's channels are written,
  // and its residual is read, in one go.
  const int64_t column_bytes = kConvColumns * (panel_floats / kConvPanel) * 4;
  const bool few = args.kh * args.kw == 1 && column_bytes <= kWeightBytes / 8;
  const int64_t group = few ? kWeightBytes / column_bytes * kConvColumns : kConvColumns;
  const bool fits = column_bytes <= kAheadBytes;
  for (int64_t group0 = block.panel0 * kConvPanel; group0 < end; group0 += group) {
    const int64_t group1 = min(group0 + group, end);
    int64_t first = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int rows = static_cast<int>(pixels / tiles + (t < pixels % tiles ? 1 : 0));
      const int64_t* offsets = scratch.offsets + first;
      for (int64_t c = group0; c < group1; c += kConvColumns) {
        const int channels = static_cast<int>(min<int64_t>(kConvColumns, end - c));
        const int whole = channels / kFloatLanes, rest = channels % kFloatLanes;
        const int vecs = whole + (rest != 0 ? 1 : 0);
        const float* weight = args.weight + c / kConvPanel * panel_floats + c % kConvPanel;
        const ConvTileFn compute =
            vecs == kConvVecs ? conv_tile_of<kConvVecs>(rows) : conv_tile_of<1>(rows);
        const int64_t ahead = !fits           ? kPrefetchSteps * kConvPanel
                              : t < tiles - 1 ? 0
                                              : group / kConvPanel * panel_floats;
        // The memory has the time of the products to bring what the store will add.
        for (int m = 0; args.residual != nullptr && m < rows; ++m) {
          const T* residual = static_cast<const T*>(args.residual) + offsets[m] + c;
          __builtin_prefetch(residual);
          __builtin_prefetch(residual + channels - 1);
        }
        compute(scratch.rows + first, depth, weight, vec_stride, ahead, tile, kConvColumns);
        if (whole == kConvVecs) {
          store_both(args, tile, rows, offsets, c);
        } else if (whole == 1) {
          store_one(args, tile, rows, offsets, c);
        }
        if (rest != 0) {
          conv_store_partial<T>(args, tile + whole * kFloatLanes, rows, offsets,
                                c + whole * kFloatLanes, rest);
        }
        for (int v = 0; sums != nullptr && v < vecs; ++v) {
          conv_add_sums(tile + v * kFloatLanes, rows, kConvColumns, sums + c + v * kFloatLanes,
                        plane);
        }
      }
      first += rows;
    }
  }
  end_stream(args.stream);
}

// Four numbers of four rows, `stride` apart, into four rows of `to_stride`, transposed.
FASTRES_INLINE void conv_transpose(const float* from, int64_t stride, float* to,
                                   int64_t to_stride) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad r[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], from + i * stride, sizeof(Quad));
  const Quad a = {r[0][0], r[1][0], r[0][1], r[1][1]}, b = {r[2][0], r[3][0], r[2][1], r[3][1]};
  const Quad c = {r[0][2], r[1][2], r[0][3], r[1][3]}, d = {r[2][2], r[3][2], r[2][3], r[3][3]};
  const Quad out[4] = {{a[0], a[1], b[0], b[1]},
                       {a[2], a[3], b[2], b[3]},
                       {c[0], c[1], d[0], d[1]},
                       {c[2], c[3], d[2], d[3]}};
  for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &out[i], sizeof(Quad));
}

// One tap's weights of a panel, from `source`, for input channels [i0, i1).
inline void conv_pack_tap(const ConvWeight& w, const float* source, int64_t i0, int64_t i1,
                          int count, float* to) {
  int64_t i = i0;
  if (count == kConvPanel && w.stride_o == 1) {
    for (; i < i1; ++i) {
      __builtin_memcpy(to + i * kConvPanel, source + i * w.stride_i, kConvPanel * sizeof(float));
    }
  } else if (count == kConvPanel && w.stride_i == 1) {
    for (; i + 4 <= i1; i += 4) {
      for (int o = 0; o < kConvPanel; o += 4) {
        conv_transpose(source + i + o * w.stride_o, w.stride_o, to + i * kConvPanel + o,
                       kConvPanel);
      }
    }
  }
  for (; i < i1; ++i) {
    for (int o = 0; o < kConvPanel; ++o) {
      to[i * kConvPanel + o] = o < count ? source[i * w.stride_i + o * w.stride_o] : 0.0f;
    }
  }
}

inline void conv_pack(const ConvWeight& w, float* packed, int64_t panel0, int64_t panel1) {
  constexpr int64_t kBlock = 16;  // input channels whose rows stay in L1 over the kernel's taps
  const int64_t taps = w.kh * w.kw;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    float* out = packed + panel * taps * w.ci * kConvPanel;
    const float* in = w.data + panel * kConvPanel * w.stride_o;
    const int count = static_cast<int>(min<int64_t>(kConvPanel, w.co - panel * kConvPanel));
    for (int64_t i0 = 0; i0 < w.ci; i0 += kBlock) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* source = in + tap / w.kw * w.stride_h + tap % w.kw * w.stride_w;
        conv_pack_tap(w, source, i0, min(i0 + kBlock, w.ci), count, out + tap * w.ci * kConvPanel);
      }
    }
  }
}

template <typename T>
void channel_sums(const void* z, int64_t rows, int64_t channels, double* sums) {
  constexpr int kTile = 16;
  constexpr int lanes = kFloatLanes;
  const T* data = static_cast<const T*>(z);
  alignas(64) float tile[kTile * lanes];
  for (int64_t r = 0; r < rows; r += kTile) {
    const int count = static_cast<int>(min<int64_t>(kTile, rows - r));
    for (int64_t c = 0; c < channels; c += lanes) {
      const int width = static_cast<int>(min<int64_t>(lanes, channels - c));
      for (int m = 0; m < count; ++m) {
        const T* p = data + (r + m) * channels + c;
        store(tile + m * lanes, width == lanes ? load(p) : load_partial(p, width));
      }
      alignas(64) double part[kConvSums * lanes] = {};
      conv_add_sums(tile, count, lanes, part, lanes);
      for (int s = 0; s < kConvSums; ++s) {
        for (int i = 0; i < width; ++i) sums[s * channels + c + i] += part[s * lanes + i];
      }
    }
  }
}

// Rows in tiles whose deviations are taken from their own mean, as in float.
template <>
void channel_sums<double>(const void* z, int64_t rows, int64_t channels, double* sums) {
  constexpr int64_t kTile = 64;
  const double* data = static_cast<const double*>(z);
  for (int64_t r = 0; r < rows; r += kTile) {
    const int64_t count = min(kTile, rows - r);
    const double* tile = data + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0, squares = 0.0;
      for (int64_t m = 0; m < count; ++m) sum += tile[m * channels + c];
      const double mean = sum / static_cast<double>(count);
      for (int64_t m = 0; m < count; ++m) {
        const double d = tile[m * channels + c] - mean;
        squares += d * d;
      }
      sums[c] += sum;
      sums[channels + c] += sum * mean;
      sums[2 * channels + c] += squares;
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
