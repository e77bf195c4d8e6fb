// BatchNorm's scale and shift, the shortcut's addition and the ReLU in one pass; and the backward
// of all of it in one sweep.
namespace fastres::cpu::FASTRES_ISA {

template <typename T, Residual R, bool Relu>
void bn_add_relu(const BnAddReluArgs& args, int64_t begin, int64_t end) {
  using A = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  constexpr int lanes = Compute<T>::lanes;
  const A* mean = static_cast<const A*>(args.mean);
  const A* scale = static_cast<const A*>(args.scale);
  const A* bias = static_cast<const A*>(args.bias);
  const A* residual_mean = static_cast<const A*>(args.residual_mean);
  const A* residual_scale = static_cast<const A*>(args.residual_scale);

  for (int64_t row = begin; row < end; row += args.period) {
    const T* z = static_cast<const T*>(args.z) + row;
    const T* residual = static_cast<const T*>(args.residual) + row;
    T* y = static_cast<T*>(args.y) + row;
    const int64_t n = min(args.period, end - row);

    auto result = [&](int64_t i, auto load_at) FASTRES_LAMBDA_INLINE -> V {
      V v = (load_at(z + i) - load_at(mean + i)) * load_at(scale + i) + load_at(bias + i);
      if constexpr (R == Residual::plain) v += load_at(residual + i);
      if constexpr (R == Residual::bn) {
        v += (load_at(residual + i) - load_at(residual_mean + i)) * load_at(residual_scale + i);
      }
      return Relu ? relu(v) : v;
    };

    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      store(y + i, result(i, [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); }),
            args.stream);
    }
    if (const int rest = static_cast<int>(n - i); rest > 0) {
      auto part = [rest](const auto* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); };
      store_partial(y + i, result(i, part), rest);
    }
  }
  end_stream(args.stream);
}

// Adds the float (for double: double) sums of a few rows to the double sums and clears them.
template <typename A>
void flush_sums(A* workspace, double* sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += static_cast<double>(workspace[i]);
    workspace[i] = 0;
  }
}

// Rows rows of n elements each, one below the other.
template <typename T, Residual R, Mask M, int Rows>
FASTRES_INLINE void bn_add_relu_backward_rows(const BnAddReluBackwardArgs& args, int64_t row,
                                              int64_t n) {
  using A = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  constexpr int lanes = Compute<T>::lanes;
  const int64_t period = args.period;
  const A* mean = static_cast<const A*>(args.mean);
  const A* scale = static_cast<const A*>(args.scale);
  const A* bias = static_cast<const A*>(args.bias);
  const A* residual_mean = static_cast<const A*>(args.residual_mean);
  const A* residual_scale = static_cast<const A*>(args.residual_scale);
  A* sum_g = static_cast<A*>(args.workspace);
  A* sum_gz = sum_g + period;
  A* sum_gr = sum_gz + period;

  auto step = [&](int64_t i, auto load_at, auto store_at, auto put_at) FASTRES_LAMBDA_INLINE {
    const V m = load_at(mean + i);
    const V s = load_at(scale + i);
    V g_sum = {}, gz_sum = {}, gr_sum = {};
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = row + r * period + i;
      V g = load_at(static_cast<const T*>(args.dy) + at);
      const V centered = load_at(static_cast<const T*>(args.z) + at) - m;
      if constexpr (M == Mask::output) {
        g = select(load_at(static_cast<const T*>(args.y) + at) <= V{}, V{}, g);
      }
      if constexpr (M == Mask::affine) {
        g = select(centered * s + load_at(bias + i) <= V{}, V{}, g);
      }
      g_sum += g;
      gz_sum += g * centered;
      put_at(static_cast<T*>(args.dz) + at, g * s);
      if constexpr (R == Residual::plain) put_at(static_cast<T*>(args.dresidual) + at, g);
      if constexpr (R == Residual::bn) {
        const V residual = load_at(static_cast<const T*>(args.residual) + at);
        gr_sum += g * (residual - load_at(residual_mean + i));
        put_at(static_cast<T*>(args.dresidual) + at, g * load_at(residual_scale + i));
      }
    }
    store_at(sum_g + i, load_at(sum_g + i) + g_sum);
    store_at(sum_gz + i, load_at(sum_gz + i) + gz_sum);
    if constexpr (R == Residual::bn) store_at(sum_gr + i, load_at(sum_gr + i) + gr_sum);
  };

  const bool stream = kVecIsLine && args.stream;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    step(
        i, [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); },
        [](auto* p, V v) FASTRES_LAMBDA_INLINE { store(p, v); },
        [stream](auto* p, V v) FASTRES_LAMBDA_INLINE { store(p, v, stream); });
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    const auto store_rest = [rest](auto* p, V v)
                                FASTRES_LAMBDA_INLINE { store_partial(p, v, rest); };
    step(
        i, [rest](const auto* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); },
        store_rest, store_rest);
  }
}

template <typename T, Residual R, Mask M>
void bn_add_relu_backward(const BnAddReluBackwardArgs& args, int64_t begin, int64_t end) {
  using A = typename Compute<T>::scalar;
  constexpr int rows_together = 4;
  constexpr int64_t rows_between_flushes = 64;
  const int64_t period = args.period;
  constexpr int sums = R == Residual::bn ? 3 : 2;
  A* workspace = static_cast<A*>(args.workspace);
  for (int64_t i = 0; i < sums * period; ++i) {
    workspace[i] = 0;
    args.sums[i] = 0;
  }
  for (int64_t block = begin; block < end; block += rows_between_flushes * period) {
    const int64_t block_end = min(end, block + rows_between_flushes * period);
    int64_t row = block;
    for (; row + rows_together * period <= block_end; row += rows_together * period) {
      bn_add_relu_backward_rows<T, R, M, rows_together>(args, row, period);
    }
    for (; row < block_end; row += period) {
      bn_add_relu_backward_rows<T, R, M, 1>(args, row, min(period, block_end - row));
    }
    flush_sums(workspace, args.sums, sums * period);
  }
  end_stream(args.stream);
}

}  // namespace fastres::cpu::FASTRES_ISA
