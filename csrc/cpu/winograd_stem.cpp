#include "winograd_stem.h"

#include <algorithm>

#include "conv_algorithm.h"
#include "conv_blocks.h"
#include "conv_pool.h"
#include "memory.h"
#include "team.h"
#include "winograd_stem_kernel.h"

namespace fastres::cpu {
namespace {

int64_t tiles_across(const ConvShape& s) { return ceil_div(s.ow, kStemTile); }

// Over n, oh and the tiles across.
struct Plan {
  int64_t images, row_blocks, column_blocks;

  int64_t blocks() const { return images * row_blocks * column_blocks; }
};

// A block's input and its transforms stay in a second level cache of 512 KB.
constexpr int64_t kBlockTiles = 224, kMostAcross = 32;

int64_t column_blocks_of(const ConvShape& s) { return ceil_div(tiles_across(s), kMostAcross); }

int64_t rows_of_block(const ConvShape& s, int64_t column_blocks) {
  return std::max<int64_t>(1, kBlockTiles / ceil_div(tiles_across(s), column_blocks));
}

// Threads get equal numbers of blocks.
Plan make_plan(const ConvShape& s, int64_t threads) {
  Plan plan{s.n, 1, column_blocks_of(s)};
  plan.row_blocks = ceil_div(s.oh, rows_of_block(s, plan.column_blocks));
  const Plan fewest = plan;
  while (plan.row_blocks < s.oh && plan.blocks() % threads != 0) ++plan.row_blocks;
  return plan.blocks() % threads == 0 || fewest.blocks() > threads ? plan : fewest;
}

PoolBand band_of(const ConvShape& s, const PoolGeometry& pool, DType dtype) {
  return {s, pool, dtype, rows_of_block(s, column_blocks_of(s))};
}

}  // namespace

bool is_winograd_stem(const ConvShape& s) {
  return s.kw == kStemTaps && s.stride[1] == 2 && s.dilation[0] == 1 && s.dilation[1] == 1 &&
         s.groups == 1 && s.ci > 0 && s.ci <= kStemChannels && s.co > 0 && s.co % kConvPanel == 0;
}

int64_t winograd_stem_packed_floats(const ConvShape& s) {
  return s.panels() * stem_panel_floats(s.kh, s.ci);
}

void winograd_stem_pack(const ConvWeight& weight, float* packed) {
  kernels().stem_pack(weight, packed, 0, weight.co / kConvPanel);
}

double winograd_stem_cost(const ConvShape& s, bool packing) {
  constexpr double pack_cost = 15.0;
  const double tiles = static_cast<double>(s.n * s.oh * tiles_across(s));
  const double weights = static_cast<double>(kStemProducts * s.kh * s.ci * s.co);
  // Each row of the kernel reads a transformed line, which as many rows share as the stride leaves.
  const double transforms = 25.0 * s.co + 200.0 * s.ci * std::min(s.stride[0], s.kh);
  return weights * (tiles + (packing ? kReadCost + pack_cost : cold_read_cost())) +
         tiles * transforms;
}

std::optional<std::vector<double>> run_winograd_stem(ConvArgs args, const ConvShape& s, DType dtype,
                                                     bool statistics) {
  set_sizes(args, s);
  const Plan plan = make_plan(s, thread_count());
  const int64_t across = tiles_across(s);
  const StemLayout largest(ceil_div(s.oh, plan.row_blocks), ceil_div(across, plan.column_blocks),
                           s.kh, s.stride[0], s.ci);
  const auto kernel = kernels().stem_block[static_cast<int>(dtype)];
  const auto scratch = [&] { return scratch_floats(largest.floats(s.ci)); };
  const auto run = [&](const Scratch& memory, int64_t, int64_t index, double* sums) {
    const int64_t w = index % plan.column_blocks;
    const int64_t h = index / plan.column_blocks % plan.row_blocks;
    const StemBlock block{.n = index / plan.column_blocks / plan.row_blocks,
                          .h0 = cut(s.oh, h, plan.row_blocks),
                          .h1 = cut(s.oh, h + 1, plan.row_blocks),
                          .tile0 = cut(across, w, plan.column_blocks),
                          .tile1 = cut(across, w + 1, plan.column_blocks),
                          .origin = 0};
    return kernel(args, block, memory.floats(), sums);
  };
  return run_blocks(1, plan.blocks(), statistics ? kConvSums * s.co : 0, scratch, run);
}

bool winograd_stem_pools(const ConvShape& s, const PoolGeometry& pool, DType dtype) {
  return band_of(s, pool, dtype).fits();
}

bool run_winograd_stem_pool(ConvArgs args, const ConvShape& s, const PoolGeometry& pool,
                            DType dtype) {
  set_sizes(args, s);
  const PoolBand band = band_of(s, pool, dtype);
  const int64_t across = tiles_across(s), column_blocks = column_blocks_of(s);
  const StemLayout largest(band.rows, ceil_div(across, column_blocks), s.kh, s.stride[0], s.ci);
  const auto kernel = kernels().stem_block[static_cast<int>(dtype)];
  ConvArgs rows_args = args;
  rows_args.stream = false;
  const auto convolve = [&](const Scratch& memory, int64_t n, int64_t h0, int64_t h1, void* rows,
                            int64_t origin) {
    ConvArgs to_rows = rows_args;
    to_rows.output = rows;
    bool finite = true;
    for (int64_t w = 0; w < column_blocks; ++w) {
      const StemBlock block{.n = n,
                            .h0 = h0,
                            .h1 = h1,
                            .tile0 = cut(across, w, column_blocks),
                            .tile1 = cut(across, w + 1, column_blocks),
                            .origin = origin};
      finite &= kernel(to_rows, block, memory.floats(), nullptr);
    }
    return finite;
  };
  return run_pooled(
      s, pool, dtype, band, args.output, args.stream,
      [&] { return scratch_floats(largest.floats(s.ci)); }, convolve);
}

}  // namespace fastres::cpu
