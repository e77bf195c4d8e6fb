// Forward convolutions: packing of weights, choice of the algorithm, and the ops.
#include <algorithm>
#include <limits>

#include "channel_rows.h"
#include "conv_algorithm.h"
#include "conv_amx.h"
#include "conv_blocks.h"
#include "conv_digits.h"
#include "conv_log.h"
#include "conv_pool.h"
#include "conv_unit.h"
#include "max_pool2d.h"
#include "memory.h"
#include "ops.h"
#include "team.h"
#include "tensor_checks.h"
#include "winograd.h"
#include "winograd_stem.h"

namespace fastres::cpu {

void pack_panels(const ConvWeight& w, ConvPackFn kernel, float* packed) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (kConvPanel * w.ci * w.kh * w.kw));
  parallel_for(0, ceil_div(w.co, kConvPanel), grain,
               [&](int64_t begin, int64_t end) { kernel(w, packed, begin, end); });
}

namespace {

DType check_weight(const char* op, const Tensor& weight) {
  return check_images(op, "weight", weight);
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

ConvShape check_sizes(const char* op, Sizes input, Sizes weight, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                      int64_t groups) {
  ConvShape s{.n = input[0],
              .ci = input[1],
              .ih = input[2],
              .iw = input[3],
              .co = weight[0],
              .oh = 0,
              .ow = 0,
              .kh = weight[2],
              .kw = weight[3],
              .stride = check_pair(op, "stride", stride, 1),
              .padding = check_pair(op, "padding", padding, 0),
              .dilation = check_pair(op, "dilation", dilation, 1),
              .groups = groups};
  if (groups < 1 || s.ci % groups != 0 || s.co % groups != 0) {
    fail(op, "groups must divide ", s.ci, " input and ", s.co, " output channels, got ", groups);
  }
  if (weight[1] != s.ci / groups || s.kh < 1 || s.kw < 1) {
    fail(op, "weight must be (C_out, C_in/groups, kh, kw) with C_in/groups = ", s.ci / groups,
         ", got ", shape_string(weight));
  }
  const auto output_size = [&](int d, int64_t size, int64_t kernel) {
    const int64_t reach = s.dilation[d] * (kernel - 1) + 1;
    const int64_t padded = size + 2 * s.padding[d];
    if (padded < reach) {
      fail(op, "input must be at least ", reach, " pixels high and wide with its padding, got ",
           shape_string(input));
    }
    return (padded - reach) / s.stride[d] + 1;
  };
  s.oh = output_size(0, s.ih, s.kh);
  s.ow = output_size(1, s.iw, s.kw);
  return s;
}

// Of images that will have the sizes `input`, beside `images`.
ConvShape check_convolution(const char* op, const Tensor& images, Sizes input, const Tensor& weight,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  check_weight(op, weight);
  check_same_dtype(op, "weight", weight, "input", images);
  return check_sizes(op, input, weight.sizes(), stride, padding, dilation, groups);
}

ConvShape check_convolution(const char* op, const Tensor& input, const Tensor& weight,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, int64_t groups) {
  check_images(op, "input", input);
  return check_convolution(op, input, input.sizes(), weight, stride, padding, dilation, groups);
}

// Length of the weights in the form that an algorithm other than aten reads.
int64_t packed_floats(const ConvShape& s, Algorithm a, DType dtype) {
  if (a == Algorithm::digits) return digits_packed_floats(s);
  if (a == Algorithm::amx) return amx_packed_floats(s, dtype);
  if (!is_winograd(a)) return s.packed_floats();
  return is_winograd_stem(s) ? winograd_stem_packed_floats(s)
                             : winograd_packed_floats(s, winograd_tile(a));
}

// So few output pixels do not repay packing the weights for them.
constexpr int64_t kPixelsWorthPacking = 65;
// The form that `packed` is in, if it is in one.
std::optional<Algorithm> form_of(const ConvShape& s, const OptionalTensor& packed, DType dtype) {
  if (!packed.has_value() || packed->numel() == 0) return std::nullopt;
  for (const Algorithm a : {Algorithm::packed, Algorithm::digits, Algorithm::amx,
                            Algorithm::winograd4, Algorithm::winograd2}) {
    if (is_winograd(a) && !winograd_takes(s, a)) continue;
    if (a == Algorithm::digits && (dtype != DType::float32 || !digits_take(s))) continue;
    if (a == Algorithm::amx && !has_matrix_unit()) continue;
    if (packed->numel() == packed_floats(s, a, dtype)) return a;
  }
  return std::nullopt;
}

// Whether images of bfloat16 go to the matrix unit, as they are.
bool amx_takes_bfloat16(const ConvShape& s, DType dtype) {
  return dtype == DType::bfloat16 && has_matrix_unit() && amx_pays(s);
}

struct Choice {
  Algorithm algorithm;
  const char* reason;
};

// `form` is the one in which the weights are packed already.
Choice choose_algorithm(const ConvShape& s, DType dtype, std::optional<Algorithm> form) {
  const bool can_pack = s.groups == 1 && s.dilation[0] == 1 && s.dilation[1] == 1 &&
                        dtype != DType::float64 && s.ci > 0 && s.co > 0;
  if (!can_pack) return {Algorithm::aten, "no kernel of ours takes it"};
  if (const auto named = algorithm_from_environment()) {
    const bool packing = form != Algorithm::digits;
    return {*named == Algorithm::aten ? Algorithm::aten : cheapest_algorithm(s, packing),
            "FASTRES_CPU_ALGORITHM is set"};
  }
  if (!form && s.pixels() < kPixelsWorthPacking) {
    return {Algorithm::aten, "too few pixels to pack the weights for"};
  }
  if (amx_takes_bfloat16(s, dtype)) return {Algorithm::amx, kTakenAsTheyAre};
  if (torch_is_faster(dtype)) return {Algorithm::aten, "torch has the faster instructions"};
  if (form) return {*form, "the weights are packed for it"};
  return {cheapest_algorithm(s, true), "the least estimated cost"};
}

// Rounded to float and padded with zeros to whole panels, so that vectors can be loaded anywhere.
Scratch padded_vector(const std::vector<double>& values) {
  const int64_t channels = static_cast<int64_t>(values.size());
  const int64_t size = (channels + kConvPanel - 1) / kConvPanel * kConvPanel;
  Scratch out = scratch_floats(size);
  for (int64_t c = 0; c < channels; ++c) out.floats()[c] = static_cast<float>(values[c]);
  std::fill(out.floats() + channels, out.floats() + size, 0.0f);
  return out;
}

void pack(const Tensor& weight, const ConvShape& s, Algorithm form, DType dtype, float* packed) {
  const ConvWeight w = conv_weight_of(weight);
  if (form == Algorithm::digits) {
    digits_pack(w, s, packed);
  } else if (form == Algorithm::amx) {
    pack_panels(w, kernels().amx_pack[static_cast<int>(dtype)], packed);
  } else if (!is_winograd(form)) {
    pack_panels(w, kernels().conv_pack, packed);
  } else if (is_winograd_stem(s)) {
    winograd_stem_pack(w, packed);
  } else {
    winograd_pack(w, s, winograd_tile(form), packed);
  }
}

// How a convolution is cut into blocks of pixels and groups of output channels.
struct Plan {
  int64_t image_blocks, row_blocks, column_blocks;  // over n, oh, ow
  int64_t channel_groups;

  int64_t pixel_blocks() const { return image_blocks * row_blocks * column_blocks; }
};

// A block's input, of which it may hold a copy, fits beside a panel of weights in a second level
// cache of 512 KB; where all the weights do not, larger blocks read them less often. A block is at
// least a few register tiles. That bounds a thread's scratch: 8 kConvRows pixels' windows, kh * kw
// * ci floats each, or twice these bytes, and 16 bytes a pixel.
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kBlockPixels = 1024;
constexpr int64_t kLargeWeights = 2 * 1024 * 1024;

Plan make_plan(const ConvShape& s, const KernelTable& table, int64_t threads) {
  // Channel groups read the input once more each, pixel blocks the weights: with few pixels and
  // large weights, threads take channels. Costs in multiply-adds of one vector.
  const int64_t depth = s.ci * s.kh * s.kw;
  const int64_t column_groups = ceil_div(s.co, table.conv_columns);
  const double lanes = table.vector_bytes / 4.0;
  Plan best{};
  double best_cost = std::numeric_limits<double>::infinity();
  int64_t best_chunks = 1;
  for (int64_t groups = 1; groups <= std::min(threads, column_groups); ++groups) {
    const int64_t chunks = ceil_div(threads, groups);
    const double tiles = ceil_div(ceil_div(s.pixels(), chunks), table.conv_rows);
    const double columns = ceil_div(column_groups, groups);
    const double compute = tiles * table.conv_rows * columns * (table.conv_columns / lanes) * depth;
    const double weights = static_cast<double>(s.packed_floats()) / groups;
    const double inputs = static_cast<double>(s.n * s.ih * s.iw * s.ci) / chunks;
    const double cost = compute + weights + inputs;
    if (cost < best_cost) {
      best_cost = cost;
      best_chunks = chunks;
      best.channel_groups = groups;
    }
  }
  const int64_t pixel_bytes = s.ci * 4 * std::min(s.stride[0], s.kh) * std::min(s.stride[1], s.kw);
  const int64_t bytes = s.packed_floats() * 4 > kLargeWeights ? 2 * kBlockBytes : kBlockBytes;
  const int64_t target =
      std::clamp<int64_t>(bytes / pixel_bytes, 8 * table.conv_rows, kBlockPixels);
  // The smallest number of blocks >= `blocks` that divides evenly among the chunks, if <= most.
  const auto balanced = [&](int64_t others, int64_t blocks, int64_t most) {
    int64_t count = blocks;
    while (count < most && others * count % best_chunks != 0) ++count;
    return others * count % best_chunks == 0 ? count : std::min(std::max(blocks, count), most);
  };
  best.image_blocks = best.row_blocks = best.column_blocks = 1;
  const int64_t image_pixels = s.oh * s.ow;
  if (image_pixels <= target && s.n >= best_chunks) {
    best.image_blocks = balanced(1, ceil_div(s.n * image_pixels, target), s.n);
    return best;
  }
  best.image_blocks = s.n;
  if (s.ow <= target) {
    const int64_t rows = std::max<int64_t>(1, target / s.ow);
    best.row_blocks = balanced(s.n, ceil_div(s.oh, rows), s.oh);
    if (s.oh > 1 || s.n * best.row_blocks >= best_chunks) return best;
  } else {
    best.row_blocks = s.oh;
  }
  best.column_blocks = balanced(s.n * best.row_blocks, ceil_div(s.ow, target),
                                std::max<int64_t>(ceil_div(s.ow, table.conv_rows), 1));
  return best;
}

// Runs the packed algorithm; returns (kConvSums, whole panels) of z where asked for.
std::vector<double> run_packed(ConvArgs args, ConvShape s, DType dtype, bool statistics) {
  const KernelTable& table = kernels();
  if (is_pointwise(s) && drop_stride(args, s)) {
    s.iw = s.ow = s.pixels();
    s.n = s.ih = s.oh = 1;
  }
  set_sizes(args, s);
  args.window = dtype != DType::float32 || args.in_mean != nullptr || s.padding[0] != 0 ||
                s.padding[1] != 0 || (s.kw != 1 && args.input_stride_w != s.ci);

  const Plan plan = make_plan(s, table, thread_count());
  const int64_t images = ceil_div(s.n, plan.image_blocks);
  const int64_t rows = ceil_div(s.oh, plan.row_blocks);
  const int64_t columns = ceil_div(s.ow, plan.column_blocks);
  const int64_t window =
      images * ((rows - 1) * s.stride[0] + s.kh) * ((columns - 1) * s.stride[1] + s.kw) * s.ci;
  const int64_t plane = s.panels() * kConvPanel;
  struct Memory {
    std::vector<const float*> rows;
    std::vector<int64_t> offsets;
    Scratch window;
  };
  const auto scratch = [&] {
    return Memory{std::vector<const float*>(images * rows * columns),
                  std::vector<int64_t>(images * rows * columns),
                  scratch_floats(args.window ? window : 0)};
  };
  const auto run = [&](Memory& memory, int64_t group, int64_t block, double* sums) {
    const int64_t w = block % plan.column_blocks;
    const int64_t h = block / plan.column_blocks % plan.row_blocks;
    const int64_t n = block / plan.column_blocks / plan.row_blocks;
    const auto [panel0, panel1] =
        panels_of_group(s, table.conv_columns, group, plan.channel_groups);
    const ConvBlock part{.n0 = cut(s.n, n, plan.image_blocks),
                         .n1 = cut(s.n, n + 1, plan.image_blocks),
                         .h0 = cut(s.oh, h, plan.row_blocks),
                         .h1 = cut(s.oh, h + 1, plan.row_blocks),
                         .w0 = cut(s.ow, w, plan.column_blocks),
                         .w1 = cut(s.ow, w + 1, plan.column_blocks),
                         .panel0 = panel0,
                         .panel1 = panel1};
    table.conv_block[static_cast<int>(dtype)](
        args, part, {memory.rows.data(), memory.offsets.data(), memory.window.floats()}, sums);
    return true;  // the direct sums are what they are
  };
  return *run_blocks(plan.channel_groups, plan.pixel_blocks(), statistics ? kConvSums * plane : 0,
                     scratch, run);
}

// What both ops give to the algorithms over packed weights. Keeps alive the weights that args
// points to.
struct PackedConv {
  Tensor weight;
  Algorithm algorithm;
  Scratch packed;
  ConvArgs args{};

  PackedConv(const Pixels& input, const Tensor& weight_, const OptionalTensor& given,
             const ConvShape& s, DType dtype, Algorithm algorithm_)
      : weight(weight_), algorithm(algorithm_) {
    if (form_of(s, given, dtype) == algorithm) {
      args.weight = static_cast<const float*>(given->const_data_ptr());
    } else {
      pack_in(s, dtype, algorithm);
    }
    args.input = input.data;
    args.input_stride_n = input.stride_n;
    args.input_stride_h = input.stride_h;
    args.input_stride_w = input.stride_w;
  }

  // Returns (kConvSums, whole panels) of z where asked for.
  std::vector<double> run(const ConvShape& s, DType dtype, bool statistics) {
    // Not finite: an infinity or a NaN has no bfloat16 parts or digits, and belongs to fewer pixels
    // than Winograd's tiles give it to.
    if (algorithm == Algorithm::digits) {
      if (run_digits(args, s)) return {};
      pack_in(s, dtype, Algorithm::packed);
    } else if (algorithm == Algorithm::amx) {
      auto sums = run_amx(args, s, dtype, statistics);
      if (sums.has_value()) return std::move(*sums);
      pack_in(s, dtype, Algorithm::packed);
    } else if (is_winograd(algorithm)) {
      auto sums = is_winograd_stem(s)
                      ? run_winograd_stem(args, s, dtype, statistics)
                      : run_winograd(args, s, dtype, winograd_tile(algorithm), statistics);
      if (sums.has_value()) return std::move(*sums);
      pack_in(s, dtype, Algorithm::packed);
    }
    return run_packed(args, s, dtype, statistics);
  }

 private:
  void pack_in(const ConvShape& s, DType dtype, Algorithm form) {
    packed = scratch_floats(packed_floats(s, form, dtype));
    pack(as_floats(weight), s, form, dtype, packed.floats());
    args.weight = packed.floats();
  }
};

Tensor aten_convolution(const Tensor& input, const Tensor& weight, const ConvShape& s) {
  using Ints = std::vector<int64_t>;
  const auto ints = [](const std::array<int64_t, 2>& pair) {
    return Ints(pair.begin(), pair.end());
  };
  return as_channels_last(call_aten<Tensor>("aten::convolution", "", input, weight,
                                            OptionalTensor(), ints(s.stride), ints(s.padding),
                                            ints(s.dilation), false, Ints{0, 0}, s.groups));
}

// relu?((z - mean) * scale + shift [+ residual]) into y, which may be z.
void apply_bn(const Tensor& z, const OptionalTensor& residual, const Tensor& y, DType dtype,
              const std::vector<double>& mean, const std::vector<double>& scale,
              const std::vector<double>& shift, bool relu) {
  const ChannelRows rows(z, dtype);
  if (rows.numel == 0) return;
  const TiledVector tiled_mean(rows, mean), tiled_scale(rows, scale), tiled_shift(rows, shift);
  BnAddReluArgs args{};
  args.z = z.const_data_ptr();
  args.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.stream = y.const_data_ptr() != z.const_data_ptr() && streams(y);
  args.mean = tiled_mean.data();
  args.scale = tiled_scale.data();
  args.bias = tiled_shift.data();
  args.period = rows.period;
  const Residual shortcut = residual.has_value() ? Residual::plain : Residual::none;
  const auto kernel =
      kernels().bn_add_relu[static_cast<int>(dtype)][static_cast<int>(shortcut)][relu];
  rows.parallel_for([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// (kConvSums, channels) of channels_last z, the same for every number of threads.
std::vector<double> sums_of(const Tensor& z, DType dtype) {
  const int64_t channels = z.size(1);
  const int64_t rows = z.size(0) * z.size(2) * z.size(3);
  const int64_t block = std::max<int64_t>(kGrainElements / std::max<int64_t>(channels, 1), 64);
  const int64_t blocks = ceil_div(rows, block);
  const int64_t sums_of_block = kConvSums * channels;
  std::vector<double> sums(std::max<int64_t>(blocks, 1) * sums_of_block);
  const char* data = static_cast<const char*>(z.const_data_ptr());
  const int64_t row_bytes = channels * static_cast<int64_t>(z.element_size());
  parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      kernels().channel_sums[static_cast<int>(dtype)](data + b * block * row_bytes,
                                                      std::min(block, rows - b * block), channels,
                                                      sums.data() + b * sums_of_block);
    }
  });
  return total_of_blocks(std::move(sums), blocks, sums_of_block);
}

ConvShape shape_to_pack(const std::vector<int64_t>& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        int64_t groups, const std::vector<int64_t>& input_size) {
  const char* op = "pack_conv_weight";
  if (groups < 1) fail(op, "groups must be >= 1, got ", groups);
  const bool valid =
      input_size.empty() ||
      (input_size.size() == 3 && *std::min_element(input_size.begin(), input_size.end()) >= 0);
  if (!valid) {
    fail(op, "input_size must be empty or (N, H, W), got ",
         shape_string({input_size.data(), input_size.size()}));
  }
  ConvShape s{.n = 0,
              .ci = weight[1] * groups,
              .ih = 0,
              .iw = 0,
              .co = weight[0],
              .oh = 0,
              .ow = 0,
              .kh = weight[2],
              .kw = weight[3],
              .stride = check_pair(op, "stride", stride, 1),
              .padding = check_pair(op, "padding", padding, 0),
              .dilation = check_pair(op, "dilation", dilation, 1),
              .groups = groups};
  if (!input_size.empty()) {
    s.n = input_size[0];
    s.ih = input_size[1];
    s.iw = input_size[2];
    s.oh = std::max<int64_t>((s.ih + 2 * s.padding[0] - s.kh) / s.stride[0] + 1, 0);
    s.ow = std::max<int64_t>((s.iw + 2 * s.padding[1] - s.kw) / s.stride[1] + 1, 0);
  }
  return s;
}

DType dtype_of_name(const char* op, const std::string& name) {
  for (int d = 0; d < kDTypes; ++d) {
    if (name == kDTypeNames[d]) return static_cast<DType>(d);
  }
  fail(op, "dtype must be float32, bfloat16, float16 or float64, got ", name);
}

// The form in which inference keeps its weights, if it does.
std::optional<Algorithm> form_to_keep(const ConvShape& s, DType dtype) {
  if (s.groups != 1 || s.dilation[0] != 1 || s.dilation[1] != 1) return std::nullopt;
  if (dtype == DType::float32) return cheapest_algorithm(s, false);
  const bool amx = amx_takes_bfloat16(s, dtype) &&
                   algorithm_from_environment().value_or(Algorithm::amx) == Algorithm::amx;
  return amx ? std::optional(Algorithm::amx) : std::nullopt;
}

}  // namespace

int64_t packed_conv_weight_numel(const std::vector<int64_t>& weight,
                                 const std::vector<int64_t>& stride,
                                 const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation, int64_t groups,
                                 const std::vector<int64_t>& input_size,
                                 const std::string& dtype_name) {
  const DType dtype = dtype_of_name("packed_conv_weight_numel", dtype_name);
  const ConvShape s = shape_to_pack(weight, stride, padding, dilation, groups, input_size);
  const auto form = form_to_keep(s, dtype);
  return form ? packed_floats(s, *form, dtype) : 0;
}

Tensor pack_conv_weight(const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        int64_t groups, const std::vector<int64_t>& input_size) {
  const DType dtype = check_weight("pack_conv_weight", weight);
  const ConvShape s =
      shape_to_pack({weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, stride,
                    padding, dilation, groups, input_size);
  const auto form = form_to_keep(s, dtype);
  Tensor packed = empty_floats(form ? packed_floats(s, *form, dtype) : 0);
  if (packed.numel() > 0) {
    pack(as_floats(weight), s, *form, dtype, static_cast<float*>(packed.mutable_data_ptr()));
  }
  return packed;
}

std::string conv_algorithm(const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                           const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                           const std::vector<int64_t>& dilation, int64_t groups,
                           const std::string& dtype_name, bool training) {
  const char* op = "conv_algorithm";
  const auto check_size = [&](const char* name, const std::vector<int64_t>& size) {
    if (size.size() != 4 || *std::min_element(size.begin(), size.end()) < 1) {
      fail(op, name, " must be four integers >= 1, got ", shape_string({size.data(), size.size()}));
    }
  };
  check_size("input_size", input);
  check_size("weight_size", weight);
  const DType dtype = dtype_of_name(op, dtype_name);
  const ConvShape s =
      check_sizes(op, {input.data(), 4}, {weight.data(), 4}, stride, padding, dilation, groups);
  // Inference keeps packed weights, as fastres.nn does.
  std::optional<Algorithm> form;
  if (!training) form = form_to_keep(s, dtype);
  return algorithm_name(choose_algorithm(s, dtype, form).algorithm);
}

namespace {

constexpr const char* kConvBnRelu = "conv_bn_relu";

}  // namespace

ConvUnit::ConvUnit(const Tensor& images, const std::array<int64_t, 4>& input, const Tensor& weight,
                   const OptionalTensor& bias, const Tensor& running_mean,
                   const Tensor& running_var, const OptionalTensor& bn_weight,
                   const OptionalTensor& bn_bias, double eps, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                   int64_t groups, bool relu, const OptionalTensor& packed)
    : shape_(check_convolution(kConvBnRelu, images, {input.data(), input.size()}, weight, stride,
                               padding, dilation, groups)),
      dtype_(check_dtype(kConvBnRelu, "input", images)),
      type_(images.scalar_type()),
      weight_(weight),
      running_mean_(running_mean),
      running_var_(running_var),
      bias_(bias),
      bn_weight_(bn_weight),
      bn_bias_(bn_bias),
      packed_(packed),
      eps_(eps),
      relu_(relu) {
  if (packed.has_value()) {
    check_cpu(kConvBnRelu, "packed", *packed);
    if (packed->dim() != 1 || packed->scalar_type() != ScalarType::Float ||
        !packed->is_contiguous()) {
      fail(kConvBnRelu, "packed must be a contiguous float32 vector, got ",
           dtype_string(packed->scalar_type()), " of shape ", shape_string(*packed));
    }
  }
  const Choice choice = choose_algorithm(shape_, dtype_, form_of(shape_, packed, dtype_));
  algorithm_ = choice.algorithm;
  reason_ = choice.reason;
}

// The vectors as they are now, checked.
struct ConvUnit::Vectors {
  Tensor mean, var;
  OptionalTensor bias, bn_weight, bn_bias;

  explicit Vectors(const ConvUnit& u)
      : mean(u.vector("running_mean", u.running_mean_)),
        var(u.vector("running_var", u.running_var_)),
        bias(u.vector("bias", u.bias_)),
        bn_weight(u.vector("bn_weight", u.bn_weight_)),
        bn_bias(u.vector("bn_bias", u.bn_bias_)) {}
};

template <typename T>
T ConvUnit::vector(const char* name, const T& t) const {
  return check_channel_vector(kConvBnRelu, name, t, shape_.co, type_);
}

int64_t ConvUnit::folded_floats() const { return 2 * shape_.panels() * kConvPanel; }

void ConvUnit::fold(float* folded) const {
  const Vectors v(*this);
  const auto floats = [](const OptionalTensor& t) {
    return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  const ConvNorm norm{.bias = floats(v.bias),
                      .mean = floats(v.mean),
                      .var = floats(v.var),
                      .bn_weight = floats(v.bn_weight),
                      .bn_bias = floats(v.bn_bias),
                      .eps = eps_};
  kernels().conv_fold(norm, shape_.co, folded, folded + shape_.panels() * kConvPanel);
}

void ConvUnit::check_residual(const std::array<int64_t, 4>& residual) const {
  const std::array<int64_t, 4> sizes = output();
  if (residual != sizes) {
    fail(kConvBnRelu, "residual must be of shape ", shape_string(sizes), ", got ",
         shape_string(residual));
  }
}

void ConvUnit::run(const Pixels& input, const void* residual, const float* folded,
                   const PoolGeometry* pool, void* output) const {
  log_convolution(kConvBnRelu, shape_, dtype_, algorithm_name(algorithm_), reason_);
  PackedConv conv(input, weight_, packed_, shape_, dtype_, algorithm_);
  ConvArgs& args = conv.args;
  args.scale = folded;
  args.shift = folded + shape_.panels() * kConvPanel;
  args.relu = relu_;
  args.residual = residual;
  args.output = output;
  if (pool == nullptr) {
    args.stream = streams(shape_.output(), type_);
    conv.run(shape_, dtype_, false);
    return;
  }
  const std::array<int64_t, 4> pooled = {pool->n, pool->c, pool->oh, pool->ow};
  args.stream = streams(pooled, type_);
  if (residual == nullptr) {
    const bool amx = algorithm_ == Algorithm::amx;
    const bool stem = is_winograd(algorithm_) && is_winograd_stem(shape_);
    if (amx && amx_pools(shape_, *pool, dtype_) && run_amx_pool(args, shape_, *pool, dtype_)) {
      return;
    }
    if (stem && winograd_stem_pools(shape_, *pool, dtype_) &&
        run_winograd_stem_pool(args, shape_, *pool, dtype_)) {
      return;
    }
  }
  const int64_t rows = shape_.pixels() * shape_.co;
  const Scratch whole(static_cast<size_t>(rows * element_bytes_of(dtype_)));
  args.output = whole.floats();
  args.stream = streams(shape_.output(), type_);
  conv.run(shape_, dtype_, false);
  max_pool2d_of(*pool, dtype_, whole.floats(), output, streams(pooled, type_));
}

Tensor ConvUnit::run(const Tensor& input, const OptionalTensor& residual,
                     const PoolGeometry* pool) const {
  OptionalTensor rows;
  if (residual.has_value()) {
    check_images(kConvBnRelu, "residual", *residual);
    check_same_dtype(kConvBnRelu, "residual", *residual, "input", input);
    check_residual({residual->size(0), residual->size(1), residual->size(2), residual->size(3)});
    rows = as_channels_last(*residual);
  }
  std::array<int64_t, 4> sizes = output();
  if (pool != nullptr) sizes = {pool->n, pool->c, pool->oh, pool->ow};
  if (algorithm_ != Algorithm::aten) {
    const Scratch folded = scratch_floats(folded_floats());
    fold(folded.floats());
    Tensor y = empty_channels_last(sizes, type_);
    if (shape_.pixels() == 0) return y;
    const Tensor dense = with_dense_channels(input);
    run(pixels_of(dense), rows.has_value() ? rows->const_data_ptr() : nullptr, folded.floats(),
        pool, y.mutable_data_ptr());
    return y;
  }
  const Vectors v(*this);
  if (shape_.pixels() == 0) return empty_channels_last(sizes, type_);
  log_convolution(kConvBnRelu, shape_, dtype_, algorithm_name(algorithm_), reason_);
  BatchNorm bn(v.mean, v.var, v.bn_weight, v.bn_bias, eps_);
  const std::vector<double> bias = channel_values(v.bias, shape_.co, 0.0);
  for (int64_t c = 0; c < shape_.co; ++c) bn.mean[c] -= bias[c];
  const Tensor z = aten_convolution(input, weight_, shape_);
  apply_bn(z, rows, z, dtype_, bn.mean, bn.scale, bn.bias, relu_);
  if (pool == nullptr) return z;
  return max_pool2d(z, {pool->kh, pool->kw}, {pool->stride_h, pool->stride_w},
                    {pool->pad_h, pool->pad_w}, {}, {}, {}, {}, 0.0);
}

Tensor conv_bn_relu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                    const Tensor& running_mean, const Tensor& running_var,
                    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps,
                    const OptionalTensor& residual, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                    int64_t groups, bool relu, const OptionalTensor& packed) {
  check_images(kConvBnRelu, "input", input);
  const std::array<int64_t, 4> sizes = {input.size(0), input.size(1), input.size(2), input.size(3)};
  return ConvUnit(input, sizes, weight, bias, running_mean, running_var, bn_weight, bn_bias, eps,
                  stride, padding, dilation, groups, relu, packed)
      .run(input, residual, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> conv_stats(
    const Tensor& input, const Tensor& weight, const OptionalTensor& in_mean,
    const OptionalTensor& in_var, const OptionalTensor& in_weight, const OptionalTensor& in_bias,
    double in_eps, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups) {
  const char* op = "conv_stats";
  const ConvShape s = check_convolution(op, input, weight, stride, padding, dilation, groups);
  const DType dtype = check_dtype(op, "input", input);
  const ScalarType type = input.scalar_type();
  const std::optional<BatchNorm> prologue =
      check_prologue(op, input, in_mean, in_var, in_weight, in_bias, in_eps);

  std::vector<double> mean(s.co, 0.0), variance(s.co, 0.0);
  const int64_t n = s.pixels();
  if (n == 0 || s.co == 0) {
    return {empty_channels_last(s.output(), type), to_channel_vector(mean, type),
            to_channel_vector(variance, type)};
  }
  std::vector<double> sums;
  Tensor z;
  const auto [algorithm, reason] = choose_algorithm(s, dtype, std::nullopt);
  log_convolution(op, s, dtype, algorithm_name(algorithm), reason);
  if (algorithm == Algorithm::aten) {
    Tensor a = input;
    if (prologue.has_value()) {
      const Tensor rows = as_channels_last(input);
      a = empty_channels_last(input.sizes(), type);
      apply_bn(rows, std::nullopt, a, dtype, prologue->mean, prologue->scale, prologue->bias, true);
    }
    z = aten_convolution(a, weight, s);
    sums = sums_of(z, dtype);
  } else {
    z = empty_channels_last(s.output(), type);
    const Tensor dense = with_dense_channels(input);
    PackedConv conv(pixels_of(dense), weight, std::nullopt, s, dtype, algorithm);
    Scratch mean_floats, scale_floats, bias_floats;
    if (prologue.has_value()) {
      mean_floats = padded_vector(prologue->mean);
      scale_floats = padded_vector(prologue->scale);
      bias_floats = padded_vector(prologue->bias);
      conv.args.in_mean = mean_floats.floats();
      conv.args.in_scale = scale_floats.floats();
      conv.args.in_bias = bias_floats.floats();
    }
    conv.args.output = z.mutable_data_ptr();
    conv.args.stream = streams(z);
    sums = conv.run(s, dtype, true);
  }
  const int64_t plane = static_cast<int64_t>(sums.size()) / kConvSums;
  for (int64_t c = 0; c < s.co; ++c) {
    const double total = sums[c];
    mean[c] = total / static_cast<double>(n);
    const double deviations = sums[plane + c] + sums[2 * plane + c] - total * mean[c];
    // Not std::max: a NaN must stay one.
    variance[c] = deviations < 0.0 ? 0.0 : deviations / static_cast<double>(n);
  }
  return {z, to_channel_vector(mean, type), to_channel_vector(variance, type)};
}

}  // namespace fastres::cpu
