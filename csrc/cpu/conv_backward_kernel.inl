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
      store(dzt + i, result(i, [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); }));
    }
    if (const int rest = static_cast<int>(n - i); rest > 0) {
      auto part = [rest](const auto* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); };
      store_partial(dzt + i, result(i, part), rest);
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
