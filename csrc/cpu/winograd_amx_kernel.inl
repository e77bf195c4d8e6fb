// Winograd's products on AMX: at every position, the bfloat16 parts of patches and kernels are
// multiplied as conv_amx_kernel.inl multiplies those of a convolution with one tap.

namespace fastres::cpu::FASTRES_ISA {

// The form of winograd_block() whose patches are WinogradAmxPatches.
template <int O>
struct WinogradParts {
  static constexpr int kPositions = (O + 2) * (O + 2);
  static constexpr int64_t kLine = kAmxDepth / 2;
  int64_t group, stride;  // of patches: from 16 tiles, a position to the next
  int64_t product_stride;

  WinogradParts(int64_t tiles, int64_t ci)
      : group(WinogradAmxPatches(tiles, ci).group()),
        stride(WinogradAmxPatches(tiles, ci).stride()),
        product_stride(
            winograd_stride(WinogradAmxPatches(tiles, ci).tiles() * kWinogradProductRow)) {}

  int64_t place(int64_t tile) const { return tile / kAmxRows * group + tile % kAmxRows * kLine; }

  template <typename T, bool kWhole, bool kPrologue>
  __attribute__((noinline)) static void patch(const WinogradParts& to, const ConvArgs& args,
                                              const T* in, unsigned lines, unsigned columns,
                                              const WinogradRows& rows, const WinogradPlace&,
                                              float* v) {
    v += to.place(rows.count[0][0]);
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

  void multiply(const ConvArgs& args, const WinogradRows& rows, int64_t panel0, int64_t panel1,
                const WinogradScratch& scratch, const Prefetch&) const {
    const int64_t tiles = rows.count[0][0];
    const int64_t position_parts = amx_panel_floats(1, args.ci);
    const int64_t panel_parts = kPositions * position_parts;
    const int64_t channels = (panel1 - panel0) * kConvPanel;
    static constexpr int64_t first_line = 0;
    const AmxDepth depth = {.steps = amx_steps(args.ci),
                            .taps = 1,
                            .places = &first_line,
                            .line = kAmxDepth,
                            .step = 2 * kAmxStep,
                            .plane = kAmxTile,
                            .panel_parts = panel_parts};
    static constexpr AmxConfig config{};
    _tile_loadconfig(&config);
    AmxMeanwhile nothing{};
    for (int position = 0; position < kPositions; ++position) {
      const float* patches = scratch.patches + position * stride;
      float* products = scratch.products + position * product_stride;
      const float* kernels = args.weight + panel0 * panel_parts + position * position_parts;
      for (int64_t c = 0; c < channels; c += kConvColumns) {
        const bool wide = channels - c > kAmxRows;
        for (int64_t tile = 0; tile < tiles; tile += 2 * kAmxRows) {
          const bool both = tiles - tile > kAmxRows;
          const int64_t starts[] = {2 * place(tile), 2 * place(tile + kAmxRows)};
          const auto compute = both ? (wide ? amx_tiles<2, 2, false> : amx_tiles<2, 1, false>)
                                    : (wide ? amx_tiles<1, 2, false> : amx_tiles<1, 1, false>);
          compute(depth, patches, starts, nullptr,
                  const_cast<float*>(kernels + c / kConvPanel * panel_parts), false,
                  products + tile * kWinogradProductRow + c, kWinogradProductRow, nothing);
        }
      }
    }
    _tile_release();
  }
};

template <int O>
void winograd_split(const float* packed, int64_t ci, float* parts, int64_t begin, int64_t end) {
  constexpr int kPositions = (O + 2) * (O + 2);
  for (int64_t i = begin; i < end; ++i) {
    const float* in = packed + i / kPositions * winograd_panel_floats(O, ci) +
                      i % kPositions * winograd_stride(ci * kConvPanel);
    float* to = parts + i * amx_panel_floats(1, ci);
    for (int64_t c = 0; c < ci; c += kAmxDepth, to += kAmxStep) {
      amx_split_weights(in + c * kConvPanel, min<int64_t>(ci - c, kAmxDepth), kAmxDepth / 2, to);
    }
  }
}

}  // namespace fastres::cpu::FASTRES_ISA
