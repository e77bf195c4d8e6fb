#include "winograd.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "conv_algorithm.h"
#include "conv_blocks.h"
#include "memory.h"
#include "team.h"
#include "winograd_kernel.h"

namespace fastres::cpu {
namespace {

std::atomic<bool> allowed{true};

// What packing a number of the kernels costs in multiply-adds.
constexpr double kPackCost = 15.0;

// How many of its products the matrix unit makes in the time of a multiply-add, and how much longer
// the transforms take that also split the patches.
constexpr double kAmxSpeed = 2.0, kAmxTransform = 1.5;

int kernel_index(int tile) { return tile == 4 ? 0 : 1; }

int64_t tile_count(const ConvShape& s, int tile) {
  return s.n * ceil_div(s.oh, tile) * ceil_div(s.ow, tile);
}

// The transforms of one tile.
double transform_cost(const ConvShape& s, int tile) {
  if (s.stride[0] == 2) {
    return tile == 4 ? 1500.0 * s.ci + 700.0 * s.co : 300.0 * s.ci + 150.0 * s.co;
  }
  return tile == 4 ? 400.0 * s.ci + 300.0 * s.co : 150.0 * s.ci + 120.0 * s.co;
}

// Different transformed kernels, and positions of a tile.
int64_t kernel_count(int tile) { return (tile + 2) * (tile + 2); }

int64_t position_count(const ConvShape& s, int tile) {
  const int64_t across = winograd_patch(tile, static_cast<int>(s.stride[0]));
  return across * across;
}

// Products of all the tiles' pairs of channels. With stride 2, pixels that are not output have none
// at the odd positions.
double product_count(const ConvShape& s, int tile) {
  const auto across = [&](int64_t size) {
    const int64_t tiles = ceil_div(size, tile);
    return s.stride[0] == 2 ? tiles * (tile + 1) + size : tiles * (tile + 2);
  };
  return static_cast<double>(s.n * across(s.oh) * across(s.ow));
}

// Length of the kernels' bfloat16 parts.
int64_t parts_floats(const ConvShape& s, int tile) {
  return kernel_count(tile) * s.panels() * amx_panel_floats(1, s.ci);
}

// Whether the products are the matrix unit's. There must be enough tiles to repay reading the parts
// of all the kernels, and where no second level cache holds these, blocks of them must take longer
// than reading them.
bool on_amx(const ConvShape& s, int tile) {
  constexpr int64_t most_floats = 1024 * 1024, fewest_tiles = 128;
  return kernels().winograd_amx_block[0][0] != nullptr && s.stride[0] == 1 &&
         parts_floats(s, tile) <= most_floats && tile_count(s, tile) >= fewest_tiles;
}

int64_t cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t size = 0;
#endif
  return std::clamp<int64_t>(size, 512 * 1024, 2048 * 1024);
}

struct Plan {
  int64_t tile_blocks, channel_groups;
};

// The most tiles of a block, whose patches and products stay in the second level cache.
int64_t most_tiles(const ConvShape& s, int tile, const KernelTable& table) {
  if (on_amx(s, tile)) {
    // A second level cache of 2 MB holds so many kernels beside the patches and products of 16
    // tiles. More come from beyond it for every block, which is then as large as it still holds.
    constexpr int64_t stay_floats = 256 * 1024;
    return parts_floats(s, tile) <= stay_floats ? kAmxRows : 2 * kAmxRows;
  }
  // Beside a position's kernels; but with many channels a block is still tall enough to repay
  // reading the kernels.
  const int64_t tile_bytes = 4 * position_count(s, tile) *
                             (winograd_row(s.ci) + winograd_row(kWinogradPanels * kConvPanel));
  const int64_t rows = table.conv_rows;
  return std::clamp<int64_t>(cache_bytes() / tile_bytes / rows * rows, 48 / s.stride[0], 384);
}

Plan make_plan(const ConvShape& s, int tile, const KernelTable& table, int64_t threads) {
  const int64_t tiles = tile_count(s, tile);
  const int64_t column_groups = ceil_div(s.co, table.conv_columns);
  const int64_t most = most_tiles(s, tile, table);
  const bool amx = on_amx(s, tile);
  const int64_t rows = amx ? kAmxRows : table.conv_rows;
  const double speed = amx ? kAmxSpeed : 1.0;
  Plan best{1, 1};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t groups = 1; groups <= std::min(threads, column_groups); ++groups) {
    const int64_t chunks = ceil_div(threads, groups);
    const int64_t chunk_tiles = ceil_div(tiles, chunks);
    const int64_t blocks = ceil_div(chunk_tiles, most);
    const double columns =
        static_cast<double>(ceil_div(column_groups, groups) * table.conv_columns);
    const double padded = static_cast<double>(ceil_div(chunk_tiles, rows) * rows);
    const double cost =
        s.ci * columns *
            (position_count(s, tile) * padded / speed + kernel_count(tile) * kReadCost * blocks) +
        transform_cost(s, tile) * chunk_tiles;
    if (cost < best_cost) {
      best_cost = cost;
      // Threads get equal numbers of blocks of about equal size.
      best = {std::min(blocks * chunks, tiles), groups};
    }
  }
  return best;
}

}  // namespace

bool winograd_allowed() { return allowed.load(std::memory_order_relaxed); }

void set_winograd_allowed(bool value) { allowed.store(value, std::memory_order_relaxed); }

bool winograd_fits(const ConvShape& s) {
  const auto both = [](const std::array<int64_t, 2>& pair, int64_t value) {
    return pair[0] == value && pair[1] == value;
  };
  return winograd_allowed() && s.kh == 3 && s.kw == 3 && (both(s.stride, 1) || both(s.stride, 2)) &&
         both(s.dilation, 1) && s.groups == 1 && s.ci > 0 && s.ci % kConvPanel == 0 && s.co > 0 &&
         s.co % kConvPanel == 0;
}

int64_t winograd_packed_floats(const ConvShape& s, int tile) {
  if (on_amx(s, tile)) return parts_floats(s, tile);
  return s.panels() * winograd_panel_floats(tile, s.ci);
}

void winograd_pack(const ConvWeight& weight, const ConvShape& s, int tile, float* packed) {
  const KernelTable& table = kernels();
  const int index = kernel_index(tile);
  const auto kernel = on_amx(s, tile) ? table.winograd_amx_pack[index]
                                      : table.winograd_pack[s.stride[0] - 1][index];
  parallel_for(0, s.panels(), 1,
               [&](int64_t begin, int64_t end) { kernel(weight, packed, begin, end); });
}

double winograd_cost(const ConvShape& s, int tile, bool packing) {
  const bool amx = on_amx(s, tile);
  const double tiles = static_cast<double>(tile_count(s, tile));
  const double weights = static_cast<double>(s.ci) * s.co;
  return weights * (product_count(s, tile) / (amx ? kAmxSpeed : 1.0) +
                    kernel_count(tile) * (packing ? kReadCost + kPackCost : cold_read_cost())) +
         tiles * transform_cost(s, tile) * (amx ? kAmxTransform : 1.0);
}

std::optional<std::vector<double>> run_winograd(ConvArgs args, const ConvShape& s, DType dtype,
                                                int tile, bool statistics) {
  const KernelTable& table = kernels();
  set_sizes(args, s);
  const bool amx = on_amx(s, tile);
  const Plan plan = make_plan(s, tile, table, thread_count());
  const int64_t tiles = tile_count(s, tile), positions = position_count(s, tile);
  const int64_t block_tiles = ceil_div(tiles, plan.tile_blocks);
  const int64_t rows = amx ? winograd_amx_groups(block_tiles) * kAmxRows : block_tiles;
  const int64_t patches = positions * (amx ? winograd_amx_stride(block_tiles, s.ci)
                                           : winograd_stride(block_tiles * winograd_row(s.ci)));
  const int64_t products =
      positions * winograd_stride(rows * winograd_row(kWinogradPanels * kConvPanel));
  const auto& blocks = amx ? table.winograd_amx_block : table.winograd_block[s.stride[0] - 1];
  const auto kernel = blocks[kernel_index(tile)][static_cast<int>(dtype)];
  const auto scratch = [&] { return scratch_floats(patches + products); };
  const auto run = [&](const Scratch& memory, int64_t group, int64_t block, double* sums) {
    const auto [panel0, panel1] =
        panels_of_group(s, table.conv_columns, group, plan.channel_groups);
    const WinogradBlock part{.tile0 = cut(tiles, block, plan.tile_blocks),
                             .tile1 = cut(tiles, block + 1, plan.tile_blocks),
                             .panel0 = panel0,
                             .panel1 = panel1};
    return kernel(args, part, {memory.floats(), memory.floats() + patches}, sums);
  };
  return run_blocks(plan.channel_groups, plan.tile_blocks, statistics ? kConvSums * s.co : 0,
                    scratch, run);
}

bool winograd_gradient_fits(const ConvShape& s) { return winograd_fits(s) && s.stride[0] == 1; }

bool winograd_gradient_pays(const ConvShape& s) {
  // Below, the 36 positions' sums cost more than the products that are saved.
  constexpr int64_t fewest_tiles = 16;
  return tile_count(s, 4) >= fewest_tiles;
}

bool run_winograd_gradient(ConvArgs args, const void* gradient, const ConvShape& s, DType dtype,
                           const WinogradKernelGradient& out) {
  const KernelTable& table = kernels();
  set_sizes(args, s);
  const WinogradGradientArgs all{args, gradient};
  const int64_t tiles = tile_count(s, 4);
  const int64_t channels = kWinogradGradientChannels / kConvPanel;  // in panels
  const int64_t in_panels = s.ci / kConvPanel, out_panels = s.panels();
  const int64_t in_blocks = ceil_div(in_panels, channels);
  const int64_t out_blocks = ceil_div(out_panels, channels);
  const int64_t blocks = in_blocks * out_blocks;
  const auto block_of = [&](int64_t block, int64_t tile0, int64_t tile1) {
    const int64_t i = block / out_blocks, o = block % out_blocks;
    return WinogradGradientBlock{.tile0 = tile0,
                                 .tile1 = tile1,
                                 .ci0 = cut(in_panels, i, in_blocks) * kConvPanel,
                                 .ci1 = cut(in_panels, i + 1, in_blocks) * kConvPanel,
                                 .co0 = cut(out_panels, o, out_blocks) * kConvPanel,
                                 .co1 = cut(out_panels, o + 1, out_blocks) * kConvPanel};
  };
  // Where channels are few, threads share the tiles of a block and their sums are added up.
  const int64_t parts = std::min(tiles, std::max<int64_t>(1, ceil_div(thread_count(), blocks)));
  const Scratch parts_sums = scratch_floats(parts > 1 ? blocks * parts * kWinogradSumFloats : 0);
  const auto accumulate = table.winograd_gradient[static_cast<int>(dtype)];
  std::atomic<bool> finite = true;
  parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory = scratch_floats(kWinogradGradientScratch + kWinogradSumFloats);
    float* own_sums = memory.floats() + kWinogradGradientScratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      const WinogradGradientBlock block =
          block_of(task / parts, cut(tiles, part, parts), cut(tiles, part + 1, parts));
      float* sums = parts > 1 ? parts_sums.floats() + task * kWinogradSumFloats : own_sums;
      std::fill(sums, sums + kWinogradSumFloats, 0.0f);
      accumulate(all, block, memory.floats(), sums);
      if (parts == 1 && !table.winograd_gradient_end(block, sums, 1, out)) finite = false;
    }
  });
  if (parts > 1) {
    // By panels of input channels, so that there is work for every thread.
    parallel_for(0, blocks * channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t panel = task % channels * kConvPanel;
        WinogradGradientBlock block = block_of(task / channels, 0, tiles);
        const int64_t ci0 = block.ci0 + panel;
        if (ci0 >= block.ci1) continue;
        block.ci0 = ci0;
        block.ci1 = ci0 + kConvPanel;
        const float* sums = parts_sums.floats() + task / channels * parts * kWinogradSumFloats +
                            panel * winograd_row(kWinogradGradientChannels);
        if (!table.winograd_gradient_end(block, sums, static_cast<int>(parts), out)) {
          finite = false;
        }
      }
    });
  }
  return finite;
}

}  // namespace fastres::cpu
