// The gradient that reaches a convolution's output once its mean and variance have theirs.
namespace fastres::cpu::FASTRES_ISA {

// dzt = dz + constant + slope * (z - mean).
template <typename T>
void bn_stats_backward(const BnStatsBackwardArgs& args, int64_t begin, int64_t end) {
  using A = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  constexpr int lanes = Compute<T>::lanes;
  const A* mean = static_cast<const A*>(args.mean);
  const A* constant = static_cast<const A*>(args.constant);
  const A* slope = static_cast<const A*>(args.slope);

  for (int64_t row = begin; row < end; row += args.period) {
    const T* dz = static_cast<const T*>(args.dz) + row;
    const T* z = static_cast<const T*>(args.z) + row;
    T* dzt = static_cast<T*>(args.dzt) + row;
    const int64_t n = min(args.period, end - row);

    auto result = [&](int64_t i, auto load_at) FASTRES_LAMBDA_INLINE -> V {
      return load_at(dz + i) +
             (load_at(constant + i) + load_at(slope + i) * (load_at(z + i) - load_at(mean + i)));
    };
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      store(dzt + i, result(i, [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); }),
            args.stream);
    }
    if (const int rest = static_cast<int>(n - i); rest > 0) {
      auto part = [rest](const auto* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); };
      store_partial(dzt + i, result(i, part), rest);
    }
  }
  end_stream(args.stream);
}

// One pixel's n channels, after the prologue if there is one.
template <bool Prologue>
FASTRES_INLINE void gather_pixel(const GatherArgs& args, const float* pixel, float* out) {
  const int64_t n = args.geometry.ci;
  auto value = [&](int64_t i, auto load_at) FASTRES_LAMBDA_INLINE -> Floats {
    if constexpr (!Prologue) return load_at(pixel + i);
    return relu((load_at(pixel + i) - load_at(args.mean + i)) * load_at(args.scale + i) +
                load_at(args.bias + i));
  };
  int64_t i = 0;
  for (; i + kFloatLanes <= n; i += kFloatLanes) {
    store(out + i, value(i, [](const float* p) FASTRES_LAMBDA_INLINE { return load(p); }));
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    auto part = [rest](const float* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); };
    store_partial(out + i, value(i, part), rest);
  }
}

// Calls on_pixel(position, i) for the i-th of all (output pixel, kh, kw), in order; the position is
// that of the input pixel, or -1 where that is padding.
template <typename F>
FASTRES_INLINE void for_each_tap(const ConvGeometry& g, int64_t begin, int64_t end, F on_pixel) {
  int64_t i = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / (g.oh * g.ow);
    const int64_t top = row / g.ow % g.oh * g.stride_h - g.pad_h;
    const int64_t left = row % g.ow * g.stride_w - g.pad_w;
    for (int64_t kh = 0; kh < g.kh; ++kh) {
      const int64_t h = top + kh * g.dilation_h;
      for (int64_t kw = 0; kw < g.kw; ++kw, ++i) {
        const int64_t w = left + kw * g.dilation_w;
        const bool inside = h >= 0 && h < g.ih && w >= 0 && w < g.iw;
        on_pixel(inside ? (image * g.ih + h) * g.iw + w : -1, i);
      }
    }
  }
}

template <bool Prologue>
void conv_gather_rows(const GatherArgs& args, int64_t begin, int64_t end, float* columns) {
  const int64_t ci = args.geometry.ci;
  auto copy_pixel = [&](int64_t pixel, int64_t i) FASTRES_LAMBDA_INLINE {
    if (pixel >= 0) {
      gather_pixel<Prologue>(args, args.input + pixel * ci, columns + i * ci);
    } else {
      for (int64_t c = 0; c < ci; ++c) columns[i * ci + c] = 0;
    }
  };
  for_each_tap(args.geometry, begin, end, copy_pixel);
}

inline void conv_gather(const GatherArgs& args, int64_t begin, int64_t end, float* columns) {
  (args.mean != nullptr ? conv_gather_rows<true> : conv_gather_rows<false>)(args, begin, end,
                                                                            columns);
}

inline void conv_scatter_add(const ConvGeometry& g, int64_t begin, int64_t end,
                             const float* columns, float* input) {
  auto add_pixel = [&](int64_t pixel, int64_t i) FASTRES_LAMBDA_INLINE {
    if (pixel < 0) return;
    float* __restrict to = input + pixel * g.ci;
    const float* __restrict from = columns + i * g.ci;
    for (int64_t c = 0; c < g.ci; ++c) to[c] += from[c];
  };
  for_each_tap(g, begin, end, add_pixel);
}

}  // namespace fastres::cpu::FASTRES_ISA
