// Winograd's products on AMX: at every position, the bfloat16 parts of patches and kernels are
// multiplied as conv_amx_kernel.inl multiplies those of a convolution with one tap.

namespace fastres::cpu::FASTRES_ISA {

// Adds a step's products of the 16 patches at v by kPanels panels of kernels, `panel` floats apart
// from u on, to the first pair of matrix tiles or to the second.
template <bool kFirst, int kPanels>
FASTRES_INLINE void winograd_products(const float* v, const float* u, int64_t panel) {
  static_assert(kPanels == 1 || kPanels == 2);
  constexpr int kStride = 64;  // bytes of a tile's row
  const auto kernels = [&](int part) FASTRES_LAMBDA_INLINE {
    _tile_loadd(6, u + part * kAmxTile, kStride);
    if (kPanels > 1) _tile_loadd(7, u + panel + part * kAmxTile, kStride);
  };
  const auto by_even_part = [&]() FASTRES_LAMBDA_INLINE {
    if constexpr (kFirst) {
      _tile_dpbf16ps(0, 4, 6);
      if (kPanels > 1) _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbf16ps(2, 4, 6);
      if (kPanels > 1) _tile_dpbf16ps(3, 4, 7);
    }
  };
  const auto by_middle_part = [&]() FASTRES_LAMBDA_INLINE {
    if constexpr (kFirst) {
      _tile_dpbf16ps(0, 5, 6);
      if (kPanels > 1) _tile_dpbf16ps(1, 5, 7);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      if (kPanels > 1) _tile_dpbf16ps(3, 5, 7);
    }
  };
  // The smallest products first.
  _tile_loadd(4, v + 2 * kAmxTile, kStride);
  kernels(0), by_even_part();
  _tile_loadd(5, v + kAmxTile, kStride);
  by_middle_part();
  kernels(1), by_middle_part();
  _tile_loadd(4, v, kStride);
  by_even_part();
  kernels(2), by_even_part();
  kernels(0), by_even_part();
}

// The sums of 16 patches' products by C panels of kernels into `out`. Panels come in pairs: the
// products of one need not wait for those of the other.
template <int C>
__attribute__((noinline)) void winograd_tiles(const float* v, const float* u, int64_t steps,
                                              float* out) {
  static_assert(C >= 1 && C <= kWinogradPanels && kWinogradPanels == 4);
  constexpr int64_t row = kWinogradProductRow * 4;
  const int64_t panel = steps * kAmxStep;
  _tile_zero(0);
  if (C > 1) _tile_zero(1);
  if (C > 2) _tile_zero(2);
  if (C > 3) _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k, v += kAmxStep, u += kAmxStep) {
    winograd_products<true, (C > 1 ? 2 : 1)>(v, u, panel);
    if constexpr (C > 2) winograd_products<false, C - 2>(v, u + 2 * panel, panel);
  }
  _tile_stored(0, out, row);
  if (C > 1) _tile_stored(1, out + kAmxRows, row);
  if (C > 2) _tile_stored(2, out + 2 * kAmxRows, row);
  if (C > 3) _tile_stored(3, out + 3 * kAmxRows, row);
}

// The same of 32 patches, the second 16 amx_panel_floats() after the first, and any number of
// panels. Where kernels come from beyond the second level cache, this reads them half as often; two
// of each at a time take the fewest reads of that cache.
inline void winograd_tile_pairs(const float* v, const float* u, int64_t steps, int64_t panels,
                                float* out) {
  static constexpr int64_t place = 0;
  const int64_t panel = steps * kAmxStep;
  const int64_t starts[] = {0, 2 * panel};
  const AmxDepth depth = {.steps = steps,
                          .taps = 1,
                          .places = &place,
                          .line = kAmxDepth,
                          .step = 2 * kAmxStep,
                          .plane = kAmxTile,
                          .panel_parts = panel};
  AmxMeanwhile nothing{};
  for (int64_t i = 0; i < panels; i += 2) {
    const auto multiply = panels - i > 1 ? amx_tiles<2, 2, false> : amx_tiles<2, 1, false>;
    multiply(depth, v, starts, nullptr, const_cast<float*>(u + i * panel), false,
             out + i * kConvPanel, kWinogradProductRow, nothing);
  }
}

// The form of winograd_block() whose patches and kernels are bfloat16 parts.
template <int O>
struct WinogradParts {
  static constexpr int kPositions = (O + 2) * (O + 2);
  int64_t groups;          // of tiles
  int64_t stride;          // of patches: from a position to the next
  int64_t product_stride;  // of products: from a position to the next

  WinogradParts(int64_t tiles, int64_t ci)
      : groups(winograd_amx_groups(tiles)),
        stride(winograd_amx_stride(tiles, ci)),
        product_stride(winograd_stride(groups * kAmxRows * kWinogradProductRow)) {}

  template <typename T, bool kWhole, bool kPrologue>
  __attribute__((noinline)) static void patch(const WinogradParts& to, const ConvArgs& args,
                                              const T* in, unsigned lines, unsigned columns,
                                              const WinogradRows& rows, const WinogradPlace&,
                                              float* v) {
    const int64_t tile = rows.count[0][0];
    v += tile / kAmxRows * amx_panel_floats(1, args.ci) + tile % kAmxRows * (kAmxDepth / 2);
    for (int64_t c = 0; c < args.ci; c += kAmxDepth, v += kAmxStep) {
      Floats first[kPositions];
      winograd_transform<T, O, 1, kWhole, kPrologue>(
          args, in, lines, columns, c,
          [&](int i, int j, Floats x) FASTRES_LAMBDA_INLINE { first[i * (O + 2) + j] = x; });
      if (c + kFloatLanes < args.ci) {
        winograd_transform<T, O, 1, kWhole, kPrologue>(
            args, in, lines, columns, c + kFloatLanes,
            [&](int i, int j, Floats x) FASTRES_LAMBDA_INLINE {
              const int position = i * (O + 2) + j;
              amx_split<kAmxParts>(first[position], x, v + position * to.stride, kAmxTile);
            });
      } else {
        for (int position = 0; position < kPositions; ++position) {
          amx_split<kAmxParts>(first[position], Floats{}, v + position * to.stride, kAmxTile);
        }
      }
    }
  }

  void multiply(const ConvArgs& args, const WinogradRows&, int64_t panel0, int64_t panel1,
                const WinogradScratch& scratch, const WinogradAhead& ahead) const {
    const int64_t steps = amx_steps(args.ci), panels = panel1 - panel0;
    // Of a panel of kernels, and of a group of patches.
    const int64_t panel_floats = steps * kAmxStep;
    const int64_t all_panels = (args.co + kConvPanel - 1) / kConvPanel;
    const auto compute = panels == 1   ? winograd_tiles<1>
                         : panels == 2 ? winograd_tiles<2>
                         : panels == 3 ? winograd_tiles<3>
                                       : winograd_tiles<4>;
    static constexpr AmxConfig config{};
    _tile_loadconfig(&config);
    for (int position = 0; position < kPositions; ++position) {
      const float* v = scratch.patches + position * stride;
      const float* u = args.weight + (position * all_panels + panel0) * panel_floats;
      float* out = scratch.products + position * product_stride;
      int64_t group = 0;
      for (; group + 1 < groups; group += 2) {
        winograd_tile_pairs(v + group * panel_floats, u, steps, panels,
                            out + group * kAmxRows * kWinogradProductRow);
      }
      if (group < groups) {
        compute(v + group * panel_floats, u, steps, out + group * kAmxRows * kWinogradProductRow);
      }
      const int64_t part = (panel0 * kPositions + position * panels) / kWinogradPanels;
      ahead.part(part, all_panels * kPositions / kWinogradPanels);
    }
    _tile_release();
  }
};

// winograd_pack() into parts: [position][panel][step][part][channel pair][16 output channels][2].
template <int O>
void winograd_amx_pack(const ConvWeight& w, float* packed, int64_t panel0, int64_t panel1) {
  constexpr int kPositions = (O + 2) * (O + 2);
  static_assert(kFloatLanes == kConvPanel);
  const int64_t panel_floats = amx_steps(w.ci) * kAmxStep;
  const int64_t stride = w.co / kConvPanel * panel_floats;
  for (int64_t panel = panel0; panel < panel1; ++panel) {
    float* const out = packed + panel * panel_floats;
    const int64_t filled = amx_steps(w.ci) * kAmxDepth;  // with zeros after the last channel
    for (int64_t i = 0; i < filled; i += 2) {
      Floats pair[2][kPositions] = {};
      for (int64_t c = i; c < min(i + 2, w.ci); ++c) {
        winograd_kernels<O, 1>(w, c, panel * kConvPanel,
                               [&](int k, int j, Floats u)
                                   FASTRES_LAMBDA_INLINE { pair[c - i][k * (O + 2) + j] = u; });
      }
      float* to = out + i / kAmxDepth * kAmxStep + i % kAmxDepth / 2 * kConvPanel;
      for (int position = 0; position < kPositions; ++position, to += stride) {
        amx_split_pairs<false>(reinterpret_cast<uint16_t*>(to), 2 * kAmxTile, pair[0][position],
                               pair[1][position]);
      }
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
