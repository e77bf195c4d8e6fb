#include "conv_amx.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "conv_blocks.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

using torch::stable::parallel_for;

struct Plan {
  int64_t image_blocks, row_blocks, channel_groups;

  int64_t pixel_blocks() const { return image_blocks * row_blocks; }
};

// A block's input in parts, which stays in a second level cache of 2 MB beside the weights of two
// panels. That bounds a thread's scratch, but for rows that are larger by themselves.
constexpr int64_t kWindowFloats = 256 * 1024;

// Images of one pixel are given to blocks by whole tiles.
int64_t image_unit(const ConvShape& s) { return s.oh * s.ow == 1 ? kAmxRows : 1; }

int64_t images_of_block(const ConvShape& s, const Plan& plan) {
  const int64_t unit = image_unit(s);
  return std::min(ceil_div(ceil_div(s.n, unit), plan.image_blocks) * unit, s.n);
}

int64_t image_cut(const ConvShape& s, int64_t i, int64_t count) {
  const int64_t unit = image_unit(s);
  return std::min(cut(ceil_div(s.n, unit), i, count) * unit, s.n);
}

// Of the busiest thread, in cycles: 96 for a step of a tile by a panel, 9 to split 32 channels of
// a pixel, and reading and splitting the weights of a step of a panel.
double plan_cost(const ConvShape& s, const ConvArgs& args, const Plan& plan, int64_t threads) {
  const int64_t images = images_of_block(s, plan), rows = ceil_div(s.oh, plan.row_blocks);
  const AmxWindow window(args, images, rows);
  const double tiles = static_cast<double>(amx_most_tiles(images, rows, s.ow));
  const double taps = static_cast<double>(s.kh * s.kw * window.steps);
  const double panels =
      static_cast<double>(ceil_div(ceil_div(s.panels(), 2), plan.channel_groups) * 2);
  const double split =
      9.0 * static_cast<double>(window.phases * window.rows * window.pitch() * window.steps);
  const double block = taps * panels * (96.0 * tiles + 300.0) + split;
  return block * static_cast<double>(ceil_div(plan.pixel_blocks() * plan.channel_groups, threads));
}

// Blocks of several images and fewer rows have fuller tiles, blocks of whole images less padding.
Plan make_plan(const ConvShape& s, int64_t threads) {
  ConvArgs args{};
  set_sizes(args, s);
  const int64_t units = ceil_div(s.n, image_unit(s));
  Plan best{s.n, s.oh, 1};
  double best_cost = std::numeric_limits<double>::infinity();
  const auto consider = [&](const Plan& plan) {
    const double cost = plan_cost(s, args, plan, threads);
    if (cost < best_cost) {
      best_cost = cost;
      best = plan;
    }
  };
  const int64_t pairs = ceil_div(s.panels(), 2);
  for (int64_t groups = 1; groups <= std::min(threads, pairs); ++groups) {
    for (int64_t images = 1; images <= std::min<int64_t>(units, 512); images *= 2) {
      const auto fits = [&](const Plan& plan) {
        return AmxWindow(args, images_of_block(s, plan), ceil_div(s.oh, plan.row_blocks))
                   .floats() <= kWindowFloats;
      };
      Plan plan{ceil_div(units, images), 1, groups};
      while (plan.row_blocks < s.oh && !fits(plan)) ++plan.row_blocks;
      if (!fits(plan) && images > 1) break;
      consider(plan);
      // The next numbers of blocks that the threads can share evenly.
      for (Plan even = plan;
           even.row_blocks < s.oh && even.row_blocks < plan.row_blocks + threads;) {
        ++even.row_blocks;
        if (even.pixel_blocks() * groups % threads == 0) consider(even);
      }
      for (Plan even = plan;
           even.image_blocks < units && even.image_blocks < plan.image_blocks + threads;) {
        ++even.image_blocks;
        if (even.pixel_blocks() * groups % threads == 0) consider(even);
      }
    }
  }
  return best;
}

}  // namespace

bool has_matrix_unit() { return kernels().amx_block[static_cast<int>(DType::float32)] != nullptr; }

bool amx_pays(const ConvShape& s) {
  return s.ci >= 16 && s.groups == 1 && s.dilation[0] == 1 && s.dilation[1] == 1;
}

std::optional<std::vector<double>> run_amx(ConvArgs args, ConvShape s, DType dtype,
                                           bool statistics) {
  if (is_pointwise(s) && drop_stride(args, s)) {
    s.n = s.pixels();
    s.ih = s.iw = s.oh = s.ow = 1;
    args.input_stride_n = args.input_stride_w;
  }
  set_sizes(args, s);
  const Plan plan = make_plan(s, torch::stable::get_num_threads());
  const int64_t images = images_of_block(s, plan);
  const int64_t rows = ceil_div(s.oh, plan.row_blocks);
  const int64_t plane = s.panels() * kConvPanel;
  const int64_t sums_of_block = statistics ? kConvSums * plane : 0;
  std::vector<double> sums(plan.pixel_blocks() * sums_of_block);
  const auto kernel = kernels().amx_block[static_cast<int>(dtype)];

  std::atomic<bool> finite = true;
  // Blocks of one channel group follow each other: their weights stay in the cache.
  parallel_for(0, plan.channel_groups * plan.pixel_blocks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch window = scratch_floats(AmxWindow(args, images, rows).floats());
    const Scratch weights = scratch_floats(2 * amx_group_pairs(s.kh * s.kw, s.ci) *
                                           amx_panel_floats(s.kh * s.kw, s.ci));
    const int64_t tiles = amx_most_tiles(images, rows, s.ow);
    std::vector<int64_t> starts(tiles), offsets(tiles * kAmxRows);
    const AmxScratch scratch{window.floats(), weights.floats(), starts.data(), offsets.data()};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / plan.pixel_blocks(), block = task % plan.pixel_blocks();
      const int64_t n = block / plan.row_blocks, h = block % plan.row_blocks;
      const auto [panel0, panel1] = panels_of_group(s, 2 * kConvPanel, group, plan.channel_groups);
      const ConvBlock part{.n0 = image_cut(s, n, plan.image_blocks),
                           .n1 = image_cut(s, n + 1, plan.image_blocks),
                           .h0 = cut(s.oh, h, plan.row_blocks),
                           .h1 = cut(s.oh, h + 1, plan.row_blocks),
                           .w0 = 0,
                           .w1 = s.ow,
                           .panel0 = panel0,
                           .panel1 = panel1};
      if (!kernel(args, part, scratch,
                  statistics ? sums.data() + block * sums_of_block : nullptr)) {
        finite = false;
      }
    }
  });
  if (!finite) return std::nullopt;
  return total_of_blocks(std::move(sums), plan.pixel_blocks(), sums_of_block);
}

}  // namespace fastres::cpu
