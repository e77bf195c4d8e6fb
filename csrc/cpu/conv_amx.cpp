#include "conv_amx.h"

#include <algorithm>
#include <limits>

#include "conv_blocks.h"
#include "conv_pool.h"
#include "memory.h"
#include "team.h"

namespace fastres::cpu {
namespace {

int parts_of(DType dtype) { return amx_parts(dtype == DType::bfloat16); }

int parts_of(const AmxConvArgs& args, DType dtype) {
  return args.weights.digits != 0 ? kPixelDigits : parts_of(dtype);
}

AmxBlockFn kernel_of(const AmxConvArgs& args, DType dtype) {
  return args.weights.digits != 0 ? kernels().digits_block
                                  : kernels().amx_block[static_cast<int>(dtype)];
}

struct Plan {
  int64_t image_blocks, row_blocks, channel_groups;

  int64_t pixel_blocks() const { return image_blocks * row_blocks; }
};

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

// What a block's work takes, in cycles.
struct Costs {
  double multiply;      // a step of a tile by a panel,
  double per_megabyte;  // and for each of the window, which is read for every panel
  double read;          // a panel's weights of a step, beside the products,
  double read_alone;    // and that with the products of up to four tiles, at least
  double fill;          // a line of a step
};

// Fitted to 3x3 convolutions of 64 to 512 channels in many plans, but for those of one part.
Costs costs_of(int parts) {
  if (parts == kPixelDigits) return {155.0, 45.0, 70.0, 0.0, 40.0};
  if (parts == 1) return {18.0, 0.0, 50.0, 0.0, 3.0};
  return {100.0, 10.0, 100.0, 450.0, 32.0};
}

// Of the busiest thread.
double plan_cost(const ConvShape& s, const ConvArgs& args, int parts, const Plan& plan,
                 int64_t threads) {
  const int64_t images = images_of_block(s, plan), rows = ceil_div(s.oh, plan.row_blocks);
  const AmxWindow window(args, images, rows, parts);
  const Costs costs = costs_of(parts);
  const double tiles = static_cast<double>(window.tiles(rows, s.ow));
  const double taps = static_cast<double>(window.taps * window.steps);
  const double panels =
      static_cast<double>(ceil_div(ceil_div(s.panels(), 2), plan.channel_groups) * 2);
  const double lines =
      static_cast<double>(window.phases * window.rows * window.pitch() * window.steps);
  const double multiply =
      costs.multiply + costs.per_megabyte * static_cast<double>(window.floats() * 4) * 1e-6;
  const double waiting = std::max(costs.read, costs.read_alone - multiply * std::min(tiles, 4.0));
  const double block = taps * panels * (multiply * tiles + waiting) + costs.fill * lines;
  return block * static_cast<double>(ceil_div(plan.pixel_blocks() * plan.channel_groups, threads));
}

// What a thread needs for blocks of such a window and at most so many tiles.
class Memory {
 public:
  Memory(const AmxWindow& window, int64_t tiles)
      : window_(scratch_floats(most_floats(window))),
        weights_(
            scratch_floats(window.parts != kAmxParts
                               ? 0  // they are not split
                               : 2 * amx_group_pairs(window.taps, window.channels, window.parts) *
                                     amx_panel_floats(window.taps, window.channels))),
        starts_(tiles),
        offsets_(tiles * kAmxRows),
        places_(window.taps) {
    if (window.parts != kPixelDigits) return;
    factors_.resize(tiles * kAmxRows);
    images_.resize(2 * window.images);
  }

  AmxScratch scratch() {
    return {.window = window_.floats(),
            .weights = weights_.floats(),
            .starts = starts_.data(),
            .offsets = offsets_.data(),
            .places = places_.data(),
            .factors = factors_.data(),
            .image_factors = images_.data(),
            .image_scales = images_.data() + images_.size() / 2};
  }

 private:
  // Smaller blocks may be by columns where the largest is not.
  static int64_t most_floats(const AmxWindow& window) {
    const bool columns = window.taps > 1 && !window.by_kernel_rows;
    return std::max(window.floats(), columns ? kAmxWindowFloats : 0);
  }

  Scratch window_, weights_;
  std::vector<int64_t> starts_, offsets_, places_;
  std::vector<float> factors_, images_;
};

// Blocks of several images and fewer rows have fuller tiles, blocks of whole images less padding.
Plan make_plan(const ConvShape& s, int parts, int64_t threads) {
  ConvArgs args{};
  set_sizes(args, s);
  const int64_t units = ceil_div(s.n, image_unit(s));
  Plan best{s.n, s.oh, 1};
  double best_cost = std::numeric_limits<double>::infinity();
  const auto consider = [&](const Plan& plan) {
    const double cost = plan_cost(s, args, parts, plan, threads);
    if (cost < best_cost) {
      best_cost = cost;
      best = plan;
    }
  };
  const int64_t pairs = ceil_div(s.panels(), 2);
  const int64_t most_images = amx_takes_rows(s.ci, s.kw) ? 1 : std::min<int64_t>(units, 512);
  for (int64_t groups = 1; groups <= std::min(threads, pairs); ++groups) {
    for (int64_t images = 1, next; images <= most_images; images = next) {
      next = images < most_images ? std::min(2 * images, most_images) : most_images + 1;
      const auto fits = [&](const Plan& plan) {
        const int64_t rows = ceil_div(s.oh, plan.row_blocks);
        // That bounds a thread's scratch, but for rows that are larger by themselves.
        return AmxWindow(args, images_of_block(s, plan), rows, parts).floats() <= kAmxWindowFloats;
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

int64_t amx_packed_floats(const ConvShape& s, DType dtype) {
  const bool by_rows = amx_takes_rows(s.ci, s.kw);
  const int64_t taps = by_rows ? s.kh : s.kh * s.kw, channels = by_rows ? s.kw * s.ci : s.ci;
  return s.panels() * amx_packed_panel_floats(taps, channels, parts_of(dtype)) + kConvPanel;
}

bool amx_pays(const ConvShape& s) {
  // A panel's first tiles wait for its weights, which few pixels repay in long sums only.
  constexpr int64_t fewest_channels = 16, fewest_pixels = 16, enough_pixels = 40, long_sum = 1024;
  const bool repays = s.pixels() >= enough_pixels ||
                      (s.pixels() >= fewest_pixels && s.ci * s.kh * s.kw >= long_sum);
  return (s.ci >= fewest_channels || amx_takes_rows(s.ci, s.kw)) && (s.n == 0 || repays) &&
         s.groups == 1 && s.dilation[0] == 1 && s.dilation[1] == 1;
}

std::optional<std::vector<double>> run_amx(AmxConvArgs args, ConvShape s, DType dtype,
                                           bool statistics) {
  ConvArgs& conv = args.conv;
  const bool dense = args.output_stride_h == s.ow * args.output_stride_w &&
                     args.output_stride_n == s.oh * args.output_stride_h;
  if (is_pointwise(s) && drop_stride(conv, s) && dense) {
    s.n = s.pixels();
    s.ih = s.iw = s.oh = s.ow = 1;
    conv.input_stride_n = conv.input_stride_w;
    args.output_stride_n = args.output_stride_w;
  }
  set_sizes(conv, s);
  const int parts = parts_of(args, dtype);
  const Plan plan = make_plan(s, parts, thread_count());
  const int64_t images = images_of_block(s, plan);
  const int64_t rows = ceil_div(s.oh, plan.row_blocks);
  const AmxWindow window(conv, images, rows, parts);
  const int64_t plane = s.panels() * kConvPanel;
  const int64_t tiles = amx_most_tiles(images, rows, s.ow);
  const auto kernel = kernel_of(args, dtype);
  const auto scratch = [&] { return Memory(window, tiles); };
  const auto run = [&](Memory& memory, int64_t group, int64_t block, double* sums) {
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
    return kernel(args, part, memory.scratch(), sums);
  };
  return run_blocks(plan.channel_groups, plan.pixel_blocks(), statistics ? kConvSums * plane : 0,
                    scratch, run);
}

AmxConvArgs dense_args(const ConvArgs& conv, const ConvShape& s) {
  AmxConvArgs args{};
  args.conv = conv;
  args.output_stride_w = s.co;
  args.output_stride_h = s.ow * s.co;
  args.output_stride_n = s.oh * s.ow * s.co;
  return args;
}

namespace {

PoolBand band_of(const ConvShape& s, const PoolGeometry& pool, DType dtype) {
  constexpr int64_t rows = 14;
  return {s, pool, dtype, std::min(rows, s.oh)};
}

AmxWindow window_of(const ConvShape& s, DType dtype, int64_t rows) {
  ConvArgs args{};
  set_sizes(args, s);
  return {args, 1, rows, parts_of(dtype)};
}

}  // namespace

std::optional<std::vector<double>> run_amx(const ConvArgs& conv, const ConvShape& s, DType dtype,
                                           bool statistics) {
  return run_amx(dense_args(conv, s), s, dtype, statistics);
}

bool amx_pools(const ConvShape& s, const PoolGeometry& pool, DType dtype) {
  const PoolBand band = band_of(s, pool, dtype);
  const AmxWindow window = window_of(s, dtype, band.rows);
  // Every band reads the weights anew, which is worth it for few.
  const int64_t pairs = ceil_div(s.panels(), 2);
  return band.fits() && window.floats() <= kAmxWindowFloats &&
         pairs <= amx_group_pairs(window.taps, window.channels, window.parts);
}

bool run_amx_pool(const ConvArgs& conv, const ConvShape& s, const PoolGeometry& pool, DType dtype) {
  AmxConvArgs args = dense_args(conv, s);
  set_sizes(args.conv, s);
  args.conv.stream = false;
  const PoolBand band = band_of(s, pool, dtype);
  const auto kernel = kernels().amx_block[static_cast<int>(dtype)];
  const auto convolve = [&](Memory& memory, int64_t n, int64_t h0, int64_t h1, void* rows,
                            int64_t origin) {
    AmxConvArgs to_rows = args;
    to_rows.conv.output = rows;
    to_rows.origin = origin;
    const ConvBlock block{.n0 = n,
                          .n1 = n + 1,
                          .h0 = h0,
                          .h1 = h1,
                          .w0 = 0,
                          .w1 = s.ow,
                          .panel0 = 0,
                          .panel1 = s.panels()};
    return kernel(to_rows, block, memory.scratch(), nullptr);
  };
  const auto memory = [&] {
    return Memory(window_of(s, dtype, band.rows), amx_most_tiles(1, band.rows, s.ow));
  };
  return run_pooled(s, pool, dtype, band, conv.output, conv.stream, memory, convolve);
}

namespace {

// The input pixels whose places are equal modulo the stride are the output of a convolution of the
// output's gradient, with those of the kernel's taps that reach them, turned.
struct Phase {
  int64_t first, pixels;   // of the input
  int64_t taps, last_tap;  // last_tap, then every stride-th before it
  int64_t padding;

  Phase(int64_t phase, int64_t size, int64_t kernel, int64_t stride, int64_t pad) : first(phase) {
    pixels = size > phase ? ceil_div(size - phase, stride) : 0;
    const int64_t first_tap = (phase + pad) % stride;
    taps = kernel > first_tap ? ceil_div(kernel - first_tap, stride) : 0;
    last_tap = first_tap + (taps - 1) * stride;
    padding = taps - 1 - (phase + pad - first_tap) / stride;
  }
};

}  // namespace

bool amx_input_gradient_pays(const ConvShape& s) {
  constexpr int64_t fewest_channels = 16, fewest_pixels = 64;
  return has_matrix_unit() && s.groups == 1 && s.dilation[0] == 1 && s.dilation[1] == 1 &&
         std::min(s.ci, s.co) >= fewest_channels && s.pixels() >= fewest_pixels;
}

std::optional<std::vector<double>> run_amx_input_gradient(AmxConvArgs args,
                                                          const ConvWeight& weight,
                                                          const ConvShape& s, DType dtype) {
  std::vector<double> total(kConvSums * ceil_div(s.ci, kConvPanel) * kConvPanel);
  const AmxConvArgs whole = args;
  for (int64_t a = 0; a < s.stride[0]; ++a) {
    for (int64_t b = 0; b < s.stride[1]; ++b) {
      const Phase h(a, s.ih, s.kh, s.stride[0], s.padding[0]);
      const Phase w(b, s.iw, s.kw, s.stride[1], s.padding[1]);
      if (h.pixels == 0 || w.pixels == 0 || h.taps == 0 || w.taps == 0) continue;
      const ConvShape t{.n = s.n,
                        .ci = s.co,
                        .ih = s.oh,
                        .iw = s.ow,
                        .co = s.ci,
                        .oh = h.pixels,
                        .ow = w.pixels,
                        .kh = h.taps,
                        .kw = w.taps,
                        .stride = {1, 1},
                        .padding = {h.padding, w.padding},
                        .dilation = {1, 1},
                        .groups = 1};
      const Scratch packed = scratch_floats(amx_packed_floats(t, dtype));
      pack_panels(turned(weight, t, {h.last_tap, w.last_tap}, s.stride),
                  kernels().amx_pack[static_cast<int>(dtype)], packed.floats());
      const int64_t first =
          (a * whole.output_stride_h + b * whole.output_stride_w) * element_bytes_of(dtype);
      args.conv.weight = packed.floats();
      args.conv.output = static_cast<char*>(whole.conv.output) + first;
      args.x = whole.x == nullptr ? nullptr : static_cast<const char*>(whole.x) + first;
      args.output_stride_h = s.stride[0] * whole.output_stride_h;
      args.output_stride_w = s.stride[1] * whole.output_stride_w;
      const auto sums = run_amx(args, t, dtype, args.x != nullptr);
      if (!sums.has_value()) return std::nullopt;
      for (size_t i = 0; i < sums->size(); ++i) total[i] += (*sums)[i];
    }
  }
  return total;
}

}  // namespace fastres::cpu
