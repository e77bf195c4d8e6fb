// Maxima of windows, of relu(bn(input)) where there is a prologue, and their gradient.
#include "max_pool2d_kernel.h"

namespace fastres::cpu::FASTRES_ISA {

struct Range {
  int64_t begin, end;
};

// The pixels of window `out` that are in the image, along one axis.
FASTRES_INLINE Range window_pixels(int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                                   int64_t size) {
  const int64_t first = out * stride - pad;
  return {max(first, int64_t{0}), min(first + kernel, size)};
}

// The windows that a pixel is in, along one axis.
FASTRES_INLINE Range pixel_windows(int64_t pixel, int64_t kernel, int64_t stride, int64_t pad,
                                   int64_t windows) {
  const int64_t beyond = pixel + pad - kernel;
  return {beyond < 0 ? 0 : beyond / stride + 1, min((pixel + pad) / stride + 1, windows)};
}

// Integers in the place of a vector's elements.
FASTRES_INLINE Ints splat_index(Floats, int64_t x) { return static_cast<int32_t>(x) - Ints{}; }
FASTRES_INLINE Longs splat_index(Doubles, int64_t x) { return x - Longs{}; }

template <typename V>
using IndicesOf = decltype(splat_index(V{}, 0));

// Calls on_vectors<K>(i) for K vectors of n channels at a time, and on_rest(i, count) for the
// channels that fill no vector.
template <typename T, typename F, typename R>
FASTRES_INLINE void for_channels(int64_t n, const F& on_vectors, const R& on_rest) {
  constexpr int lanes = Compute<T>::lanes;
  constexpr int together = 4;
  int64_t i = 0;
  for (; i + together * lanes <= n; i += together * lanes) {
    on_vectors.template operator()<together>(i);
  }
  for (; i + lanes <= n; i += lanes) on_vectors.template operator()<1>(i);
  if (const int rest = static_cast<int>(n - i); rest > 0) on_rest(i, rest);
}

// K vectors of channels [i, ...) of the maximum over a window's pixels, before the ReLU.
template <typename T, bool Prologue, bool Taps, int K>
struct WindowMaximum {
  using A = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  using I = IndicesOf<V>;
  static constexpr int lanes = Compute<T>::lanes;

  V best[K];
  I tap[K];  // which of the window's pixels, (y * kw + x) in the whole window

  // As torch: the first of equals, the last of NaNs.
  template <typename Args, typename L>
  FASTRES_INLINE WindowMaximum(const Args& args, int64_t image, int64_t oy, Range ys, int64_t ox,
                               Range xs, int64_t i, const L& load_at) {
    const PoolGeometry& g = args.geometry;
    [[maybe_unused]] V mean[K], scale[K], bias[K];
    if constexpr (Prologue) {
      for (int k = 0; k < K; ++k) {
        mean[k] = load_at(static_cast<const A*>(args.mean) + i + k * lanes);
        scale[k] = load_at(static_cast<const A*>(args.scale) + i + k * lanes);
        bias[k] = load_at(static_cast<const A*>(args.bias) + i + k * lanes);
      }
    }
    const int64_t top = oy * g.stride_h - g.pad_h, left = ox * g.stride_w - g.pad_w;
    int64_t number = (ys.begin - top) * g.kw + xs.begin - left;
    for (int k = 0; k < K; ++k) {
      best[k] = splat(static_cast<A>(-__builtin_inf()));
      if constexpr (Taps) tap[k] = splat_index(V{}, number);
    }
    const int64_t outside = g.kw - (xs.end - xs.begin);
    for (int64_t y = ys.begin; y < ys.end; ++y, number += outside) {
      const T* p =
          static_cast<const T*>(args.input) + ((image * g.ih + y) * g.iw + xs.begin) * g.c + i;
      for (int64_t x = xs.begin; x < xs.end; ++x, ++number, p += g.c) {
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          V v = load_at(p + k * lanes);
          if constexpr (Prologue) v = (v - mean[k]) * scale[k] + bias[k];
          const I better = (v > best[k]) | (v != v);
          best[k] = select(better, v, best[k]);
          if constexpr (Taps) tap[k] = better ? splat_index(V{}, number) : tap[k];
        }
      }
    }
  }
};

template <typename T, bool Prologue>
void max_pool2d(const MaxPoolArgs& args, int64_t begin, int64_t end) {
  using V = typename Compute<T>::vec;
  constexpr int lanes = Compute<T>::lanes;
  const PoolGeometry& g = args.geometry;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / g.oh, oy = row % g.oh;
    const Range ys = window_pixels(oy, g.kh, g.stride_h, g.pad_h, g.ih);
    for (int64_t ox = 0; ox < g.ow; ++ox) {
      const Range xs = window_pixels(ox, g.kw, g.stride_w, g.pad_w, g.iw);
      T* out = static_cast<T*>(args.output) + (row * g.ow + ox) * g.c;
      auto result = [](V v) FASTRES_LAMBDA_INLINE { return Prologue ? relu(v) : v; };
      for_channels<T>(
          g.c,
          [&]<int K>(int64_t i) FASTRES_LAMBDA_INLINE {
            const WindowMaximum<T, Prologue, false, K> maximum(
                args, image, oy, ys, ox, xs, i,
                [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); });
            for (int k = 0; k < K; ++k) {
              store(out + i + k * lanes, result(maximum.best[k]), args.stream);
            }
          },
          [&](int64_t i, int rest) FASTRES_LAMBDA_INLINE {
            const WindowMaximum<T, Prologue, false, 1> maximum(
                args, image, oy, ys, ox, xs, i,
                [rest](const auto* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); });
            store_partial(out + i, result(maximum.best[0]), rest);
          });
    }
  }
  end_stream(args.stream);
}

// Which pixel each window of an output row has its maximum from; -1 where ReLU makes it 0.
template <typename T, bool Prologue>
void max_pool2d_taps(const MaxPoolBackwardArgs& args, int64_t image, int64_t oy, void* taps) {
  using V = typename Compute<T>::vec;
  using I = IndicesOf<V>;
  constexpr int lanes = Compute<T>::lanes;
  const PoolGeometry& g = args.geometry;
  const int64_t pitch = args.taps_pitch;
  const Range ys = window_pixels(oy, g.kh, g.stride_h, g.pad_h, g.ih);
  for (int64_t ox = 0; ox < g.ow; ++ox) {
    const Range xs = window_pixels(ox, g.kw, g.stride_w, g.pad_w, g.iw);
    auto put = [&](int64_t i, V best, I tap) FASTRES_LAMBDA_INLINE {
      const I zero = best <= V{};
      if constexpr (Prologue) tap |= zero;
      __builtin_memcpy(static_cast<typename Compute<T>::scalar*>(taps) + ox * pitch + i, &tap,
                       sizeof(tap));
    };
    for_channels<T>(
        g.c,
        [&]<int K>(int64_t i) FASTRES_LAMBDA_INLINE {
          const WindowMaximum<T, Prologue, true, K> maximum(
              args, image, oy, ys, ox, xs, i,
              [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); });
          for (int k = 0; k < K; ++k) put(i + k * lanes, maximum.best[k], maximum.tap[k]);
        },
        [&](int64_t i, int rest) FASTRES_LAMBDA_INLINE {
          const WindowMaximum<T, Prologue, true, 1> maximum(
              args, image, oy, ys, ox, xs, i,
              [rest](const auto* p) FASTRES_LAMBDA_INLINE { return load_partial(p, rest); });
          put(i, maximum.best[0], maximum.tap[0]);
        });
  }
}

// Each input pixel adds up dy of the windows whose maximum it is, in their order.
template <typename T, bool Prologue>
void max_pool2d_backward(const MaxPoolBackwardArgs& args, int64_t image, int64_t begin,
                         int64_t end) {
  using A = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  using I = IndicesOf<V>;
  constexpr int lanes = Compute<T>::lanes;
  constexpr int64_t pixels_between_flushes = 64;
  const PoolGeometry& g = args.geometry;
  const int64_t pitch = args.taps_pitch, ring = args.taps_rows;
  A* taps = static_cast<A*>(args.workspace);
  A* sum_g = taps + ring * g.ow * pitch;
  A* sum_gx = sum_g + g.c;
  if constexpr (Prologue) {
    for (int64_t i = 0; i < 2 * g.c; ++i) {
      sum_g[i] = 0;
      args.sums[i] = 0;
    }
  }
  const bool stream = kVecIsLine && args.stream;

  int64_t next = 0;  // row of taps
  for (int64_t y = begin; y < end; ++y) {
    const Range oys = pixel_windows(y, g.kh, g.stride_h, g.pad_h, g.oh);
    for (next = max(next, oys.begin); next < oys.end; ++next) {
      max_pool2d_taps<T, Prologue>(args, image, next, taps + next % ring * g.ow * pitch);
    }
    for (int64_t x = 0; x < g.iw; ++x) {
      const Range oxs = pixel_windows(x, g.kw, g.stride_w, g.pad_w, g.ow);
      const int64_t pixel = ((image * g.ih + y) * g.iw + x) * g.c;

      auto gather = [&]<int K>(int64_t i, V(&sum)[K], const auto& load_at) FASTRES_LAMBDA_INLINE {
        for (int k = 0; k < K; ++k) sum[k] = V{};
        for (int64_t oy = oys.begin; oy < oys.end; ++oy) {
          const int64_t number = (y + g.pad_h - oy * g.stride_h) * g.kw + x + g.pad_w;
          const A* row_taps = taps + oy % ring * g.ow * pitch + i;
          const T* row = static_cast<const T*>(args.dy) + (image * g.oh + oy) * g.ow * g.c + i;
          for (int64_t ox = oxs.begin; ox < oxs.end; ++ox) {
            const I here = splat_index(V{}, number - ox * g.stride_w);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) {
              const I tap = bit_cast<I>(load(row_taps + ox * pitch + k * lanes));
              sum[k] += select(tap == here, load_at(row + ox * g.c + k * lanes), V{});
            }
          }
        }
      };
      // The gradient of the input from that of relu(bn(input)), which it adds to the sums.
      auto finish = [&](int64_t i, V sum, const auto& load_at, const auto& store_at)
                        FASTRES_LAMBDA_INLINE -> V {
        if constexpr (Prologue) {
          const V x = load_at(static_cast<const T*>(args.input) + pixel + i);
          const V centered = x - load_at(static_cast<const A*>(args.mean) + i);
          store_at(sum_g + i, load_at(sum_g + i) + sum);
          store_at(sum_gx + i, load_at(sum_gx + i) + sum * centered);
          return sum * load_at(static_cast<const A*>(args.scale) + i);
        } else {
          return sum;
        }
      };
      T* dinput = static_cast<T*>(args.dinput) + pixel;
      for_channels<T>(
          g.c,
          [&]<int K>(int64_t i) FASTRES_LAMBDA_INLINE {
            const auto load_at = [](const auto* p) FASTRES_LAMBDA_INLINE { return load(p); };
            const auto store_at = [](auto* p, V v) FASTRES_LAMBDA_INLINE { store(p, v); };
            V sum[K];
            gather.template operator()<K>(i, sum, load_at);
            for (int k = 0; k < K; ++k) {
              const int64_t at = i + k * lanes;
              store(dinput + at, finish(at, sum[k], load_at, store_at), stream);
            }
          },
          [&](int64_t i, int rest) FASTRES_LAMBDA_INLINE {
            const auto load_at = [rest](const auto* p)
                                     FASTRES_LAMBDA_INLINE { return load_partial(p, rest); };
            const auto store_at = [rest](auto* p, V v)
                                      FASTRES_LAMBDA_INLINE { store_partial(p, v, rest); };
            V sum[1];
            gather.template operator()<1>(i, sum, load_at);
            store_at(dinput + i, finish(i, sum[0], load_at, store_at));
          });
      if constexpr (Prologue) {
        if (x % pixels_between_flushes == pixels_between_flushes - 1 || x + 1 == g.iw) {
          flush_sums(sum_g, args.sums, 2 * g.c);
        }
      }
    }
  }
  end_stream(args.stream);
}

}  // namespace fastres::cpu::FASTRES_ISA
