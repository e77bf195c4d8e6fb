// Means over pixels, and their products with a weight's rows. Each sum has one order, whatever its
// image's batch and the number of threads.
#include "avg_pool_linear_kernel.h"

namespace fastres::cpu::FASTRES_ISA {

// Adds Rows rows of n channels to the sums, which are padded to whole vectors.
template <typename T, int Rows>
FASTRES_INLINE void add_pixels(const T* rows, int64_t stride, int64_t n,
                               typename Compute<T>::scalar* sums) {
  using V = typename Compute<T>::vec;
  constexpr int lanes = Compute<T>::lanes;
  auto add = [&](int64_t i, auto load_at) FASTRES_LAMBDA_INLINE {
    V x[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) x[r] = load_at(rows + r * stride + i);
#pragma GCC unroll 8
    for (int half = Rows / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < half; ++r) x[r] += x[r + half];
    }
    store(sums + i, load(sums + i) + x[0]);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    add(i, [](const T* p) FASTRES_LAMBDA_INLINE { return load(p); });
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    add(i, [rest](const T* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); });
  }
}

template <typename T>
void avg_pool(const AvgPoolLinearArgs& args, int64_t begin, int64_t end) {
  using A = typename Compute<T>::scalar;
  constexpr int lanes = Compute<T>::lanes;
  constexpr int together = 8;
  constexpr int64_t block = 512;  // pixels whose sum is a running one: rounding errors pile up
  const int64_t pieces = (args.channels + kAvgPoolChannels - 1) / kAvgPoolChannels;
  const int64_t stride = args.channels;
  alignas(64) A sums[kAvgPoolChannels];

  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t image = piece / pieces, first = piece % pieces * kAvgPoolChannels;
    const int64_t n = min(kAvgPoolChannels, args.channels - first);
    const T* pixels = static_cast<const T*>(args.input) + image * args.pixels * stride + first;
    A* means = static_cast<A*>(args.means) + image * args.pitch + first;
    for (int64_t i = 0; i < n; i += lanes) store(means + i, typename Compute<T>::vec{});
    for (int64_t p0 = 0; p0 < args.pixels; p0 += block) {
      const int64_t p1 = min(p0 + block, args.pixels);
      for (int64_t i = 0; i < n; i += lanes) store(sums + i, typename Compute<T>::vec{});
      int64_t p = p0;
      for (; p + together <= p1; p += together) {
        add_pixels<T, together>(pixels + p * stride, stride, n, sums);
      }
      for (; p < p1; ++p) add_pixels<T, 1>(pixels + p * stride, stride, n, sums);
      for (int64_t i = 0; i < n; i += lanes) store(means + i, load(means + i) + load(sums + i));
    }
    const auto count = splat(static_cast<A>(args.pixels));
    for (int64_t i = 0; i < n; i += lanes) store(means + i, load(means + i) / count);
  }
}

// A number for each row of a tile.
template <typename A>
struct OfRows {
  typedef A type __attribute__((vector_size(kLinearRows * sizeof(A))));
};

// The sum of each vector's elements.
template <typename A, typename V>
FASTRES_INLINE typename OfRows<A>::type fold(const V (&vectors)[kLinearRows]) {
  using Rows = typename OfRows<A>::type;
  typedef A Part __attribute__((vector_size(16)));
  constexpr int parts = kVecBytes / 16, lanes = 16 / sizeof(A);
  Part part[kLinearRows];
  for (int r = 0; r < kLinearRows; ++r) {
    Part of_vector[parts];
    __builtin_memcpy(of_vector, &vectors[r], sizeof(V));
    for (int half = parts / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) of_vector[i] += of_vector[i + half];
    }
    part[r] = of_vector[0];
  }
  Rows sums[lanes];
  for (int i = 0; i < lanes; ++i) sums[i] = Rows{part[0][i], part[1][i], part[2][i], part[3][i]};
  if constexpr (lanes == 4) return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sums[0] + sums[1];
}

// Results of Images images, from `image` on, and of `count` rows, from `row` on.
template <typename T, int Images>
FASTRES_INLINE void linear_tile(const AvgPoolLinearArgs& args, int64_t image, int64_t row,
                                int count) {
  using A = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  using Rows = typename OfRows<A>::type;
  constexpr int lanes = Compute<T>::lanes;
  constexpr int64_t block = 32 * lanes;  // channels whose sum is a running one
  const A* means = static_cast<const A*>(args.means) + image * args.pitch;
  const T* weights[kLinearRows];  // where there are fewer, the last one again
  for (int r = 0; r < kLinearRows; ++r) {
    weights[r] = static_cast<const T*>(args.weight) + (row + min(r, count - 1)) * args.channels;
  }

  V totals[Images][kLinearRows] = {};
  for (int64_t c0 = 0; c0 < args.channels; c0 += block) {
    const int64_t c1 = min(c0 + block, args.channels);
    V sums[Images][kLinearRows] = {};
    auto multiply = [&](int64_t c, auto load_at) FASTRES_LAMBDA_INLINE {
      V w[kLinearRows];
#pragma GCC unroll 4
      for (int r = 0; r < kLinearRows; ++r) w[r] = load_at(weights[r] + c);
#pragma GCC unroll 4
      for (int i = 0; i < Images; ++i) {
        const V mean = load(means + i * args.pitch + c);
#pragma GCC unroll 4
        for (int r = 0; r < kLinearRows; ++r) sums[i][r] += w[r] * mean;
      }
    };
    int64_t c = c0;
    for (; c + lanes <= c1; c += lanes) {
      multiply(c, [](const T* p) FASTRES_LAMBDA_INLINE { return load(p); });
    }
    if (const int rest = static_cast<int>(c1 - c); rest > 0) {
      multiply(c, [rest](const T* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); });
    }
    for (int i = 0; i < Images; ++i) {
      for (int r = 0; r < kLinearRows; ++r) totals[i][r] += sums[i][r];
    }
  }

  Rows bias = {};
  if (args.bias != nullptr) {
    const T* from = static_cast<const T*>(args.bias) + row;
    if constexpr (sizeof(T) == sizeof(A)) {
      __builtin_memcpy(&bias, from, count * sizeof(T));
    } else {
      const V loaded = load_partial(from, count);
      __builtin_memcpy(&bias, &loaded, sizeof(bias));
    }
  }
  for (int i = 0; i < Images; ++i) {
    const Rows result = fold<A>(totals[i]) + bias;
    T* to = static_cast<T*>(args.output) + (image + i) * args.outputs + row;
    if constexpr (sizeof(T) == sizeof(A)) {
      __builtin_memcpy(to, &result, count * sizeof(T));
    } else {
      V rounded = {};
      __builtin_memcpy(&rounded, &result, sizeof(result));
      store_partial(to, rounded, count);
    }
  }
}

template <typename T>
void linear(const AvgPoolLinearArgs& args, int64_t begin, int64_t end) {
  // As many as have registers for their sums.
  constexpr int together = kVecBytes == 64 ? 4 : 2;
  static_assert(kLinearImages % together == 0);
  const int64_t blocks = (args.images + kLinearImages - 1) / kLinearImages;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile / blocks * kLinearRows;
    const int count = static_cast<int>(min(kLinearRows, args.outputs - row));
    int64_t image = tile % blocks * kLinearImages;
    const int64_t images_end = min(image + kLinearImages, args.images);
    for (; image + together <= images_end; image += together) {
      linear_tile<T, together>(args, image, row, count);
    }
    for (; image < images_end; ++image) linear_tile<T, 1>(args, image, row, count);
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
