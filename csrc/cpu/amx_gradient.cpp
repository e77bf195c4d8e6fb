#include "amx_gradient.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>

#include "conv_blocks.h"
#include "memory.h"
#include "team.h"
#include "winograd.h"

namespace fastres::cpu {
namespace {

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A pointwise convolution as one of a picture one pixel high, whose rows have no ends.
void flatten(ConvArgs& args, ConvShape& s) {
  if (!is_pointwise(s) || !drop_stride(args, s)) return;
  s.iw = s.ow = s.pixels();
  s.n = s.ih = s.oh = 1;
}

// Whether a tap's shift by columns is one by whole products.
bool shifts(const ConvShape& s, int64_t images) {
  return images % kAmxPixels == 0 || s.kw <= s.stride[1];
}

int64_t variants_of(const ConvShape& s, int64_t images) {
  return shifts(s, images) ? std::min(s.stride[1], s.kw) : s.kw;
}

int64_t lists_of(const ConvShape& s, int64_t images) {
  return std::min(s.stride[0], s.kh) * variants_of(s, images);
}

// In cycles: the products of two panels and 32 pixels, and the transform of a number. To read
// images that are far apart is worth so many lists.
struct Costs {
  double product, transform, far_apart;
};

Costs costs_of(int parts) { return parts == 1 ? Costs{70.0, 0.3, 0.5} : Costs{400.0, 0.5, 2.5}; }

// The best number of innermost images: rows' ends waste products, and so does a tap's part of a row
// outside the input; many images are far apart in memory.
int64_t best_images(const ConvShape& s, const Costs& costs) {
  int64_t best = 1;
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t images = 1; images <= kAmxPixels && images < 2 * s.n; images *= 2) {
    int64_t steps = 0;
    for (int64_t kw = 0; kw < s.kw; ++kw) {
      const int64_t first = ceil_div(std::max<int64_t>(s.padding[1] - kw, 0), s.stride[1]);
      const int64_t last =
          std::clamp<int64_t>((s.iw - 1 + s.padding[1] - kw) / s.stride[1] + 1, first, s.ow);
      steps += ceil_div(last * images, kAmxPixels) - first * images / kAmxPixels;
    }
    const double rows = static_cast<double>(ceil_div(s.n, images) * s.oh);
    const double pairs = static_cast<double>(ceil_div(s.ci, kAmxPanel) * ceil_div(s.co, kAmxPanel));
    const double lists =
        static_cast<double>(lists_of(s, images)) + (images == kAmxPixels ? costs.far_apart : 0.0);
    const double cost =
        rows * (steps * s.kh * pairs * costs.product +
                round_up(s.ow * images, kAmxPixels) * lists * s.ci * costs.transform);
    if (cost < best_cost) best_cost = cost, best = images;
  }
  return best;
}

// How the pixels are cut into blocks, and blocks and channels into tasks.
struct Plan {
  int64_t images, groups;
  int64_t group_cuts, row_cuts, column_cuts;
  int64_t parts, left_blocks, right_blocks;

  int64_t chunks() const { return group_cuts * row_cuts * column_cuts; }
};

Plan make_plan(const ConvShape& s, int parts_of_number, int64_t threads) {
  const int64_t left = ceil_div(s.ci, kAmxPanel), right = ceil_div(s.co, kAmxPanel);
  const int64_t taps = s.kh * s.kw;
  Plan plan{};
  const Costs costs = costs_of(parts_of_number);
  plan.images = best_images(s, costs);
  plan.groups = ceil_div(s.n, plan.images);
  const int64_t lists = lists_of(s, plan.images);

  // In cycles of a thread: products, the transforms of what each part reads, the sums.
  constexpr double sum = 1.0;
  const double product = costs.product / (kAmxPanel * kAmxPanel * kAmxPixels);
  const double pixels = static_cast<double>(s.pixels());
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const int64_t blocks = std::min(ceil_div(threads, parts), std::max(left, right));
    const int64_t left_blocks = left >= right ? blocks : 1,
                  right_blocks = left >= right ? 1 : blocks;
    const double ci = static_cast<double>(ceil_div(left, left_blocks) * kAmxPanel);
    const double co = static_cast<double>(ceil_div(right, right_blocks) * kAmxPanel);
    const double cost =
        pixels / parts * (ci * co * taps * product + (lists * ci + co) * costs.transform) +
        taps * ci * co * sum * (parts > 1 ? 2 : 1);
    if (cost < best_cost) {
      best_cost = cost;
      plan.parts = parts;
      plan.left_blocks = left_blocks;
      plan.right_blocks = right_blocks;
    }
  }

  // A panel of either side stays in the second level cache, and where a pixel has one product so
  // does the whole of the smaller side; more pixels make fewer additions of sums.
  constexpr int64_t bytes = 800 * 1024, fewest = 512, most = 2048;
  const int64_t smaller =
      std::min(ceil_div(left, plan.left_blocks), ceil_div(right, plan.right_blocks));
  const int64_t panels = taps == 1 ? smaller : 1 + lists;
  const int64_t length =
      std::clamp(bytes / (2 * parts_of_number * kAmxPanel * panels), fewest, most);
  const int64_t row = round_up(s.ow * plan.images, kAmxPixels);
  plan.group_cuts = plan.groups;
  plan.row_cuts = plan.column_cuts = 1;
  const auto even = [&](int64_t wanted, int64_t largest, int64_t others) {
    int64_t cuts = std::min(wanted, largest);
    while (cuts < largest && cuts * others % plan.parts != 0) ++cuts;
    return cuts;
  };
  if (row * s.oh <= length) {
    plan.group_cuts = even(ceil_div(plan.groups * row * s.oh, length), plan.groups, 1);
  } else if (row <= length) {
    plan.row_cuts = even(ceil_div(row * s.oh, length), s.oh, plan.groups);
  } else {
    plan.row_cuts = s.oh;
    plan.column_cuts = even(ceil_div(row, length), ceil_div(row, kAmxPixels), plan.groups * s.oh);
  }
  plan.parts = std::min(plan.parts, plan.chunks());
  return plan;
}

// Chunk `index` of all the pixels; the channels are left to the caller.
AmxGradientBlock chunk_of(const ConvShape& s, const Plan& plan, int64_t index) {
  const int64_t column = index % plan.column_cuts;
  const int64_t row = index / plan.column_cuts % plan.row_cuts;
  const int64_t group = index / plan.column_cuts / plan.row_cuts;
  const int64_t group0 = cut(plan.groups, group, plan.group_cuts);
  // Columns are cut where products begin.
  const int64_t unit = kAmxPixels / std::gcd(kAmxPixels, plan.images);
  const int64_t units = ceil_div(s.ow, unit);
  AmxGradientBlock b{};
  b.n0 = group0 * plan.images;
  b.n1 = s.n;
  b.groups = cut(plan.groups, group + 1, plan.group_cuts) - group0;
  b.images = plan.images;
  b.h0 = cut(s.oh, row, plan.row_cuts);
  b.h1 = cut(s.oh, row + 1, plan.row_cuts);
  b.w0 = cut(units, column, plan.column_cuts) * unit;
  b.w1 = std::min(cut(units, column + 1, plan.column_cuts) * unit, s.ow);
  return b;
}

AmxGradientLayout layout_of(const ConvShape& s, const AmxGradientBlock& b) {
  const int64_t width = b.w1 - b.w0;
  AmxGradientLayout l{};
  l.phases = std::min(s.stride[0], s.kh);
  l.variants = variants_of(s, b.images);
  l.columns = width + (s.kw - 1) / l.variants;
  l.variant_row = round_up(l.columns * b.images, kAmxPixels);
  l.rows = b.h1 - b.h0 + (s.kh - 1) / s.stride[0];
  l.window = l.phases * l.variants * b.groups * l.rows * l.variant_row;
  l.gradient_row = round_up(width * b.images, kAmxPixels);
  l.gradient_group = (b.h1 - b.h0) * l.gradient_row;
  l.gradient = b.groups * l.gradient_group;
  return l;
}

}  // namespace

bool amx_gradient_fits(const ConvShape& s, DType dtype) {
  // Fewer channels leave most of a tile empty.
  constexpr int64_t fewest_channels = 12;
  const bool dilated = s.dilation[0] != 1 || s.dilation[1] != 1;
  return kernels().amx_gradient[static_cast<int>(dtype)] != nullptr && s.groups == 1 && !dilated &&
         s.pixels() > 0 && s.ci >= fewest_channels && s.co >= fewest_channels;
}

bool amx_gradient_pays(const ConvShape& s) {
  // Winograd's products are a quarter, but it transforms more, which few products do not repay; and
  // with few pixels it is the rows' ends and the weights themselves that take the time.
  constexpr int64_t fewest_products = 128 * 128, fewest_pixels = 256;
  if (s.pixels() < fewest_pixels) return false;
  return !winograd_gradient_fits(s) ||
         s.ci * s.co >= fewest_products * lists_of(s, best_images(s, costs_of(kAmxParts)));
}

bool run_amx_gradient(AmxGradientArgs args, const ConvShape& shape, DType dtype,
                      const WinogradKernelGradient& out) {
  const KernelTable& table = kernels();
  ConvShape s = shape;
  flatten(args.conv, s);
  set_sizes(args.conv, s);
  const int parts = amx_parts(dtype == DType::bfloat16);
  const auto kernel = table.amx_gradient[static_cast<int>(dtype)];
  const Plan plan = make_plan(s, parts, thread_count());
  const int64_t left_panels = ceil_div(s.ci, kAmxPanel), right_panels = ceil_div(s.co, kAmxPanel);
  const int64_t most_left = ceil_div(left_panels, plan.left_blocks);
  const int64_t most_right = ceil_div(right_panels, plan.right_blocks);
  AmxGradientLayout most{};
  for (int64_t chunk = 0; chunk < plan.chunks(); ++chunk) {
    const AmxGradientLayout l = layout_of(s, chunk_of(s, plan, chunk));
    most.window = std::max(most.window, l.window);
    most.gradient = std::max(most.gradient, l.gradient);
  }
  const int64_t left_floats = most_left * parts * kAmxPanel * most.window / 2;
  const int64_t right_floats = most_right * parts * kAmxPanel * most.gradient / 2;
  const int64_t offset_floats = 2 * std::max(most.window, most.gradient);
  const int64_t blocks = plan.left_blocks * plan.right_blocks;
  const int64_t sum_floats = most_left * most_right * s.kh * s.kw * kAmxSumFloats;
  // A block of one part and chunk writes its gradient itself.
  const bool whole = plan.chunks() == 1;
  const Scratch sums = scratch_floats(whole ? 0 : blocks * plan.parts * sum_floats);
  const auto block_sums = [&](int64_t block) {
    return sums.floats() + block * plan.parts * sum_floats;
  };
  const auto set_channels = [&](int64_t block, auto& b) {
    const int64_t i = block / plan.right_blocks, o = block % plan.right_blocks;
    b.ci0 = cut(left_panels, i, plan.left_blocks) * kAmxPanel;
    b.ci1 = std::min(cut(left_panels, i + 1, plan.left_blocks) * kAmxPanel, s.ci);
    b.co0 = cut(right_panels, o, plan.right_blocks) * kAmxPanel;
    b.co1 = std::min(cut(right_panels, o + 1, plan.right_blocks) * kAmxPanel, s.co);
  };

  std::atomic<bool> finite = true;
  parallel_for(0, blocks * plan.parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch memory = scratch_floats(left_floats + right_floats + offset_floats +
                                          (whole ? s.kh * s.kw * kAmxSumFloats : 0));
    AmxGradientScratch scratch{};
    scratch.left = reinterpret_cast<uint16_t*>(memory.floats());
    scratch.right = reinterpret_cast<uint16_t*>(memory.floats() + left_floats);
    scratch.offsets = reinterpret_cast<int64_t*>(memory.floats() + left_floats + right_floats);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / plan.parts, part = task % plan.parts;
      const int64_t first = cut(plan.chunks(), part, plan.parts);
      const int64_t last = cut(plan.chunks(), part + 1, plan.parts);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        AmxGradientBlock b = chunk_of(s, plan, chunk);
        set_channels(block, b);
        float* to = whole ? memory.floats() + left_floats + right_floats + offset_floats
                          : block_sums(block) + part * sum_floats;
        if (!kernel(args, b, layout_of(s, b), scratch, to, chunk != first,
                    whole ? &out : nullptr)) {
          finite = false;
        }
      }
    }
  });

  if (whole) return finite;
  // By panels of output channels, so that there is work for every thread.
  parallel_for(0, blocks * most_right, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / most_right;
      AmxGradientEnd e{};
      set_channels(block, e);
      e.panel = task % most_right;
      e.panels = ceil_div(e.co1 - e.co0, kAmxPanel);
      if (e.panel >= e.panels) continue;
      e.co0 += e.panel * kAmxPanel;
      e.co1 = std::min(e.co1, e.co0 + kAmxPanel);
      e.sums = block_sums(block);
      e.distance = sum_floats;
      e.count = static_cast<int>(plan.parts);
      if (!table.amx_gradient_end(args.conv, e, out)) finite = false;
    }
  });
  return finite;
}

}  // namespace fastres::cpu
