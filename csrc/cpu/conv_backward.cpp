#include <algorithm>
#include <array>

#include "amx_gradient.h"
#include "backward_sweep.h"
#include "channel_rows.h"
#include "conv_algorithm.h"
#include "conv_amx.h"
#include "conv_backward_gemm.h"
#include "conv_blocks.h"
#include "conv_log.h"
#include "memory.h"
#include "ops.h"
#include "tensor_checks.h"
#include "winograd.h"

namespace fastres::cpu {
namespace {

constexpr const char* kOp = "conv_stats_backward";
// As the log has them.
constexpr const char* kInputGradient = "conv_stats_backward, gradient of the input,";
constexpr const char* kWeightGradient = "conv_stats_backward, gradient of the weight,";

// Checks that z can be the convolution's output, and fills in the sizes.
void check_convolution(const Tensor& input, const Tensor& weight, const Tensor& z,
                       ConvShape& conv) {
  check_cpu(kOp, "weight", weight);
  check_same_dtype(kOp, "weight", weight, "input", input);
  if (conv.groups < 1 || input.size(1) % conv.groups != 0) {
    fail(kOp, "groups must be a divisor of input's ", input.size(1), " channels, got ",
         conv.groups);
  }
  if (weight.dim() != 4 || weight.size(1) != input.size(1) / conv.groups ||
      weight.size(0) % conv.groups != 0) {
    fail(kOp, "weight must be of shape (multiple of ", conv.groups, ", ",
         input.size(1) / conv.groups, ", kernel height, kernel width), got ", shape_string(weight));
  }
  std::array<int64_t, 4> expected = {input.size(0), weight.size(0), 0, 0};
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = conv.dilation[d] * (weight.size(2 + d) - 1) + 1;
    const int64_t steps = input.size(2 + d) + 2 * conv.padding[d] - reach;
    if (weight.size(2 + d) < 1 || steps < 0) {
      fail(kOp, "weight must be a kernel within the padded input, got ", shape_string(weight),
           " and input ", shape_string(input));
    }
    expected[2 + d] = steps / conv.stride[d] + 1;
  }
  for (int d = 0; d < 4; ++d) {
    if (z.dim() != 4 || z.size(d) != expected[d]) {
      fail(kOp, "z must be of shape ", shape_string(expected), ", got ", shape_string(z));
    }
  }
  conv.n = input.size(0);
  conv.ci = input.size(1);
  conv.ih = input.size(2);
  conv.iw = input.size(3);
  conv.co = z.size(1);
  conv.oh = z.size(2);
  conv.ow = z.size(3);
  conv.kh = weight.size(2);
  conv.kw = weight.size(3);
}

// dzt = dz + dmean/n + dvar*2*(z - mean)/n: z's gradient, its mean's and its variance's as one.
class OutputGradient {
 public:
  OutputGradient(const Tensor& dz, const Tensor& dmean, const Tensor& dvar, const Tensor& z,
                 const Tensor& mean, DType dtype)
      : dz_(as_channels_last(dz)), z_(as_channels_last(z)), rows_(z_, dtype) {
    if (rows_.numel == 0) return;
    const double n = static_cast<double>(rows_.numel / rows_.channels);
    std::vector<double> constant = channel_values(dmean, rows_.channels, 0.0);
    std::vector<double> slope = channel_values(dvar, rows_.channels, 0.0);
    for (int64_t c = 0; c < rows_.channels; ++c) {
      constant[c] /= n;
      slope[c] *= 2.0 / n;
    }
    mean_ = TiledVector(rows_, channel_values(mean, rows_.channels, 0.0));
    constant_ = TiledVector(rows_, constant);
    slope_ = TiledVector(rows_, slope);
  }

  // What its kernel takes, but for dzt.
  BnStatsBackwardArgs args() const {
    BnStatsBackwardArgs args{};
    args.dz = dz_.const_data_ptr();
    args.z = z_.const_data_ptr();
    args.mean = mean_.data();
    args.constant = constant_.data();
    args.slope = slope_.data();
    args.period = rows_.period;
    return args;
  }

  // Computes it at the first call.
  const Tensor& compute() const {
    if (dzt_.has_value()) return *dzt_;
    const Tensor& dzt = dzt_.emplace(empty_channels_last(z_.sizes(), z_.scalar_type()));
    if (rows_.numel == 0) return dzt;
    BnStatsBackwardArgs args = this->args();
    args.dzt = dzt.mutable_data_ptr();
    args.stream = streams(dzt);
    const auto kernel = kernels().bn_stats_backward[static_cast<int>(rows_.dtype)];
    rows_.parallel_for([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return dzt;
  }

  // Whether there is a dzt in memory already.
  bool is_computed() const { return dzt_.has_value(); }

 private:
  Tensor dz_, z_;
  mutable OptionalTensor dzt_;
  ChannelRows rows_;
  TiledVector mean_, constant_, slope_;
};

// The BatchNorm and ReLU that the convolution applies as it loads its input.
struct Prologue {
  BatchNorm bn;
  ChannelRows rows;
  TiledVector mean, scale, bias;

  Prologue(BatchNorm in_bn, const Tensor& input, DType dtype)
      : bn(std::move(in_bn)),
        rows(input, dtype),
        mean(rows, bn.mean),
        scale(rows, bn.scale),
        bias(rows, bn.bias) {}

  Tensor apply(const Tensor& input) const {
    Tensor a = empty_channels_last(input.sizes(), input.scalar_type());
    if (rows.numel == 0) return a;
    BnAddReluArgs args{};
    args.z = input.const_data_ptr();
    args.y = a.mutable_data_ptr();
    args.stream = streams(a);
    args.mean = mean.data();
    args.scale = scale.data();
    args.bias = bias.data();
    args.period = rows.period;
    const auto kernel =
        kernels().bn_add_relu[static_cast<int>(rows.dtype)][static_cast<int>(Residual::none)][true];
    rows.parallel_for([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return a;
  }

  // Turns da into the input's gradient in place; returns the sums that the vectors' ones need.
  RowSums backward(const Tensor& da, const Tensor& input) const {
    BnAddReluBackwardArgs args{};
    args.dy = da.const_data_ptr();
    args.z = input.const_data_ptr();
    args.dz = da.mutable_data_ptr();
    args.mean = mean.data();
    args.scale = scale.data();
    args.bias = bias.data();
    args.period = rows.period;
    return backward_sweep(rows, kernels().prologue_backward[static_cast<int>(rows.dtype)], args);
  }
};

// The gradient in weight's memory format: channels_last only where weight has no other.
Tensor in_format_of(const Tensor& weight, const Tensor& dweight) {
  const bool channels_last = !weight.is_contiguous() && is_channels_last(weight);
  return torch::stable::contiguous(
      dweight, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// (gradient of a, gradient of weight) of conv(a, weight), each where asked for.
std::pair<OptionalTensor, OptionalTensor> convolution_backward(const Tensor& dzt, const Tensor& a,
                                                               const Tensor& weight,
                                                               const ConvShape& conv,
                                                               bool needs_input,
                                                               bool needs_weight) {
  using Ints = std::vector<int64_t>;
  const auto ints = [](const std::array<int64_t, 2>& pair) {
    return Ints(pair.begin(), pair.end());
  };
  const DType dtype = check_dtype(kOp, "dz", dzt);
  const char* reason = "nothing of ours is faster";
  if (needs_input) log_convolution(kInputGradient, conv, dtype, "aten", reason);
  if (needs_weight) log_convolution(kWeightGradient, conv, dtype, "aten", reason);
  const std::array<bool, 3> mask = {needs_input, needs_weight, false};
  const auto [da, dweight, dbias] = call_aten<Tensor, Tensor, Tensor>(
      "aten::convolution_backward", "", dzt, a, weight, std::optional<Ints>(), ints(conv.stride),
      ints(conv.padding), ints(conv.dilation), false, Ints{0, 0}, conv.groups,
      torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
  return {needs_input ? OptionalTensor(da) : std::nullopt,
          needs_weight ? OptionalTensor(dweight) : std::nullopt};
}

// Width of pictures on which oneDNN leaves much of the processor idle.
constexpr int64_t kNarrow = 8;

// Where backward_gemm is the faster of the two, as measured. oneDNN is good at larger kernels
// without a stride, but for narrow pictures, and at an image's three channels.
bool gemm_is_faster(const Tensor& input, const Tensor& weight, const Tensor& z,
                    const ConvShape& conv) {
  constexpr int64_t fewest_channels = 16;
  if (input.scalar_type() != ScalarType::Float || conv.groups != 1 || z.numel() == 0) return false;
  const bool larger_kernel = weight.size(2) > 1 || weight.size(3) > 1;
  const bool strided = conv.stride[0] > 1 || conv.stride[1] > 1;
  return input.size(1) >= fewest_channels && (!larger_kernel || strided || z.size(3) < kNarrow);
}

struct Gradients {
  OptionalTensor input, weight;
  BatchNormGradients vectors;
};

// Through aten; a prologue's result exists as long as the weight's gradient takes.
Gradients backward_aten(const OutputGradient& output, const Tensor& input, const Tensor& weight,
                        const std::optional<Prologue>& prologue, const ConvShape& conv,
                        bool needs_input, bool needs_weight) {
  Gradients gradients;
  {
    const Tensor a = prologue && needs_weight ? prologue->apply(input) : input;
    const auto [da, dweight] =
        convolution_backward(output.compute(), a, weight, conv, needs_input, needs_weight);
    if (da.has_value()) gradients.input = as_channels_last(*da);
    gradients.weight = dweight;
  }
  if (prologue && needs_input) {
    const RowSums sums = prologue->backward(*gradients.input, input);
    gradients.vectors = BatchNormGradients(prologue->bn, sums[0], sums[1]);
  }
  return gradients;
}

constexpr const char* kMeasured = "measured as the fastest";

// By blocks of matrix products; the input's gradient through aten where that is the faster.
Gradients backward_gemm(const OutputGradient& output, const Tensor& input, const Tensor& weight,
                        const Tensor& z, const std::optional<Prologue>& prologue,
                        const ConvShape& conv, bool needs_input, bool needs_weight) {
  const Tensor weight_rows = as_channels_last(weight);
  Gradients gradients;
  ConvBackwardGemm gemm;
  gemm.geometry = {
      .n = conv.n,
      .ih = conv.ih,
      .iw = conv.iw,
      .ci = conv.ci,
      .oh = conv.oh,
      .ow = conv.ow,
      .co = conv.co,
      .kh = conv.kh,
      .kw = conv.kw,
      .stride_h = conv.stride[0],
      .stride_w = conv.stride[1],
      .pad_h = conv.padding[0],
      .pad_w = conv.padding[1],
      .dilation_h = conv.dilation[0],
      .dilation_w = conv.dilation[1],
  };
  gemm.input = static_cast<const float*>(input.const_data_ptr());
  gemm.weight = static_cast<const float*>(weight_rows.const_data_ptr());
  gemm.dzt_args = output.args();
  if (prologue) {
    gemm.in_mean = static_cast<const float*>(prologue->mean.data());
    gemm.in_scale = static_cast<const float*>(prologue->scale.data());
    gemm.in_bias = static_cast<const float*>(prologue->bias.data());
    gemm.in_period = prologue->rows.period;
  }
  if (needs_weight) {
    log_convolution(kWeightGradient, conv, DType::float32, "gemm", kMeasured);
    gradients.weight = empty_channels_last(weight.sizes(), ScalarType::Float);
    gemm.dweight = static_cast<float*>(gradients.weight->mutable_data_ptr());
  }
  OptionalTensor dzt;
  std::vector<double> sums;
  const bool larger_kernel = gemm.geometry.kh > 1 || gemm.geometry.kw > 1;
  if (needs_input && larger_kernel && z.size(3) >= kNarrow) {
    dzt = output.compute();
    gemm.dzt = static_cast<const float*>(dzt->const_data_ptr());
    gradients.input =
        as_channels_last(*convolution_backward(*dzt, input, weight_rows, conv, true, false).first);
  } else if (needs_input) {
    log_convolution(kInputGradient, conv, DType::float32, "gemm", kMeasured);
    gradients.input = empty_channels_last(input.sizes(), ScalarType::Float);
    if (!gemm.pointwise()) torch::stable::zero_(*gradients.input);
    gemm.dinput = static_cast<float*>(gradients.input->mutable_data_ptr());
    if (prologue && gemm.pointwise()) {
      sums.resize(2 * gemm.in_period);
      gemm.in_sums = sums.data();
    }
  }
  if (gemm.dweight != nullptr || gemm.dinput != nullptr) gemm.run();

  if (prologue && needs_input) {
    if (gemm.in_sums != nullptr) {
      const auto [sum_g, sum_gx] = prologue->rows.fold<2>(sums.data());
      gradients.vectors = BatchNormGradients(prologue->bn, sum_g, sum_gx);
    } else {
      const RowSums row_sums = prologue->backward(*gradients.input, input);
      gradients.vectors = BatchNormGradients(prologue->bn, row_sums[0], row_sums[1]);
    }
  }
  return gradients;
}

// Which of the two gradients are Winograd's.
struct WinogradPlan {
  bool weight = false;
  std::optional<Algorithm> input;  // winograd4 or winograd2
};

// The convolution that turns the output's gradient into the input's: the kernels turned by half a
// circle, their channels exchanged.
ConvShape transposed(const ConvShape& s) {
  ConvShape t = s;
  std::swap(t.ci, t.co);
  std::swap(t.ih, t.oh);
  std::swap(t.iw, t.ow);
  for (int d = 0; d < 2; ++d) t.padding[d] = 2 - s.padding[d];
  return t;
}

WinogradPlan plan_winograd(const ConvShape& s, DType dtype) {
  WinogradPlan plan;
  const bool fits = dtype != DType::float64 && winograd_gradient_fits(s) && s.pixels() > 0 &&
                    s.padding[0] <= 2 && s.padding[1] <= 2;
  if (!fits) return plan;
  const std::optional<Algorithm> named = algorithm_from_environment();
  if (named ? !is_winograd(*named) : torch_is_faster(dtype)) return plan;
  plan.weight = named || winograd_gradient_pays(s);
  const Algorithm form = cheapest_algorithm(transposed(s), true);
  if (is_winograd(form)) plan.input = form;
  return plan;
}

const char* why_winograd() {
  return algorithm_from_environment() ? "FASTRES_CPU_ALGORITHM is set" : "the least estimated cost";
}

// Whether the matrix unit's gradients are written for this dtype.
bool amx_multiplies(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16; }

const char* why_amx(DType dtype) {
  return dtype == DType::bfloat16 && !algorithm_from_environment() ? kTakenAsTheyAre
                                                                   : why_winograd();
}

// The input's gradient, or none where a result is not finite and may be wrong.
OptionalTensor winograd_input_gradient(const Tensor& dzt, const Tensor& weight, const ConvShape& s,
                                       DType dtype, Algorithm form) {
  log_convolution(kInputGradient, s, dtype, algorithm_name(form), why_winograd());
  const ConvShape t = transposed(s);
  const int tile = winograd_tile(form);
  const Tensor kernels = as_floats(weight);
  const Scratch packed = scratch_floats(winograd_packed_floats(t, tile));
  winograd_pack(turned(conv_weight_of(kernels), t, {2, 2}, {1, 1}), t, tile, packed.floats());
  const Tensor dinput =
      empty_channels_last(std::array<int64_t, 4>{s.n, s.ci, s.ih, s.iw}, dzt.scalar_type());
  ConvArgs args{};
  args.input = dzt.const_data_ptr();
  args.input_stride_w = t.ci;
  args.input_stride_h = t.iw * t.ci;
  args.input_stride_n = t.ih * t.iw * t.ci;
  args.weight = packed.floats();
  args.output = dinput.mutable_data_ptr();
  args.stream = streams(dinput);
  if (!run_winograd(args, t, dtype, tile, false).has_value()) return std::nullopt;
  return dinput;
}

// An uninitialised gradient in float32, in the weight's format.
Tensor empty_in_format_of(const Tensor& weight) {
  const bool channels_last = !weight.is_contiguous() && is_channels_last(weight);
  return channels_last ? empty_channels_last(weight.sizes(), ScalarType::Float)
                       : torch::stable::empty(weight.sizes(), ScalarType::Float);
}

Tensor in_dtype_of(const Tensor& weight, const Tensor& dweight) {
  return weight.scalar_type() == ScalarType::Float
             ? dweight
             : torch::stable::to(dweight, weight.scalar_type());
}

WinogradKernelGradient kernel_gradient(const Tensor& dweight) {
  return {static_cast<float*>(dweight.mutable_data_ptr()), dweight.stride(0), dweight.stride(1),
          dweight.stride(2), dweight.stride(3)};
}

// The input, dense, and what is applied to it.
ConvArgs input_args(const Tensor& input, const std::optional<Prologue>& prologue,
                    const ConvShape& s) {
  ConvArgs args{};
  args.input = input.const_data_ptr();
  args.input_stride_w = s.ci;
  args.input_stride_h = s.iw * s.ci;
  args.input_stride_n = s.ih * s.iw * s.ci;
  if (prologue) {
    args.in_mean = static_cast<const float*>(prologue->mean.data());
    args.in_scale = static_cast<const float*>(prologue->scale.data());
    args.in_bias = static_cast<const float*>(prologue->bias.data());
  }
  return args;
}

// The weight's gradient in the weight's format, or none where a result is not finite.
OptionalTensor winograd_weight_gradient(const Tensor& dzt, const Tensor& input,
                                        const Tensor& weight,
                                        const std::optional<Prologue>& prologue, const ConvShape& s,
                                        DType dtype) {
  log_convolution(kWeightGradient, s, dtype, "winograd", why_winograd());
  const Tensor dweight = empty_in_format_of(weight);
  const ConvArgs args = input_args(input, prologue, s);
  const WinogradKernelGradient out = kernel_gradient(dweight);
  if (!run_winograd_gradient(args, dzt.const_data_ptr(), s, dtype, out)) return std::nullopt;
  return in_dtype_of(weight, dweight);
}

// The weight's gradient by AMX in the weight's format, or none where a result is not finite.
OptionalTensor amx_weight_gradient(const OutputGradient& output, const Tensor& input,
                                   const Tensor& weight, const std::optional<Prologue>& prologue,
                                   const ConvShape& s, DType dtype) {
  log_convolution(kWeightGradient, s, dtype, "amx", why_amx(dtype));
  const Tensor dweight = empty_in_format_of(weight);
  const BnStatsBackwardArgs stats = output.args();
  AmxGradientArgs args{};
  args.conv = input_args(input, prologue, s);
  if (output.is_computed()) {
    args.dz = output.compute().const_data_ptr();
  } else {
    args.dz = stats.dz;
    args.z = stats.z;
  }
  args.mean = static_cast<const float*>(stats.mean);
  args.constant = static_cast<const float*>(stats.constant);
  args.slope = static_cast<const float*>(stats.slope);
  if (!run_amx_gradient(args, s, dtype, kernel_gradient(dweight))) return std::nullopt;
  return in_dtype_of(weight, dweight);
}

// Whether FASTRES_CPU_ALGORITHM names amx; nothing where it names what this shape can't have.
std::optional<bool> amx_is_named(const ConvShape& s) {
  const std::optional<Algorithm> named = algorithm_from_environment();
  if (!named || (is_winograd(*named) && !winograd_gradient_fits(s))) return std::nullopt;
  return *named == Algorithm::amx;
}

// `shared` where backward_gemm reads the same for the input's gradient: with few channels that is
// faster than to read it twice.
bool weight_by_amx(const ConvShape& s, DType dtype, bool shared) {
  if (!amx_gradient_fits(s, dtype)) return false;
  if (const auto named = amx_is_named(s)) return *named;
  if (dtype == DType::bfloat16) return true;
  constexpr int64_t few_channels = 256;
  const bool small = s.kh * s.kw == 1 && std::min(s.ci, s.co) < few_channels;
  return amx_gradient_pays(s) && !(shared && small);
}

// A channel vector padded with zeros to whole panels.
Scratch padded(const void* values, int64_t channels) {
  const int64_t size = ceil_div(channels, kConvPanel) * kConvPanel;
  Scratch out = scratch_floats(size);
  std::copy_n(static_cast<const float*>(values), channels, out.floats());
  std::fill(out.floats() + channels, out.floats() + size, 0.0f);
  return out;
}

// The gradients of the input and of the prologue's vectors by AMX, or none where one is not finite.
std::optional<Gradients> amx_input_gradient(const OutputGradient& output, const Tensor& input,
                                            const Tensor& weight,
                                            const std::optional<Prologue>& prologue,
                                            const ConvShape& s, DType dtype) {
  log_convolution(kInputGradient, s, dtype, "amx", why_amx(dtype));
  Gradients gradients;
  gradients.input = empty_channels_last(input.sizes(), input.scalar_type());
  Tensor dinput = *gradients.input;
  if (s.kh < s.stride[0] || s.kw < s.stride[1]) torch::stable::zero_(dinput);
  const BnStatsBackwardArgs stats = output.args();
  const Scratch mean = padded(stats.mean, s.co), slope = padded(stats.slope, s.co),
                constant = padded(stats.constant, s.co);
  AmxConvArgs args{};
  args.conv.input = stats.dz;
  args.conv.input_stride_w = s.co;
  args.conv.input_stride_h = s.ow * s.co;
  args.conv.input_stride_n = s.oh * s.ow * s.co;
  args.conv.in_mean = mean.floats();
  args.conv.in_scale = slope.floats();
  args.conv.in_bias = constant.floats();
  args.z = stats.z;
  args.conv.output = dinput.mutable_data_ptr();
  args.conv.stream = streams(dinput);
  args.output_stride_w = s.ci;
  args.output_stride_h = s.iw * s.ci;
  args.output_stride_n = s.ih * s.iw * s.ci;
  Scratch x_mean, x_scale, x_bias;
  if (prologue) {
    x_mean = padded(prologue->mean.data(), s.ci);
    x_scale = padded(prologue->scale.data(), s.ci);
    x_bias = padded(prologue->bias.data(), s.ci);
    args.x = input.const_data_ptr();
    args.x_mean = x_mean.floats();
    args.x_scale = x_scale.floats();
    args.x_bias = x_bias.floats();
  }
  const Tensor kernels = as_floats(weight);
  const auto sums = run_amx_input_gradient(args, conv_weight_of(kernels), s, dtype);
  if (!sums.has_value()) return std::nullopt;
  if (prologue) {
    const auto plane = sums->begin() + static_cast<int64_t>(sums->size()) / kConvSums;
    gradients.vectors = BatchNormGradients(prologue->bn, {sums->begin(), sums->begin() + s.ci},
                                           {plane, plane + s.ci});
  }
  return gradients;
}

bool input_by_amx(const ConvShape& s, DType dtype) {
  if (!amx_multiplies(dtype) || !amx_input_gradient_pays(s)) return false;
  if (const auto named = amx_is_named(s)) return *named;
  if (dtype == DType::bfloat16) return true;
  const bool winograd = winograd_gradient_fits(s) && s.padding[0] <= 2 && s.padding[1] <= 2;
  return !winograd || cheapest_algorithm(transposed(s), true) == Algorithm::amx;
}

// By Winograd's algorithm where the plan says so and no infinity or NaN forbids it, else by aten.
Gradients backward_winograd(const OutputGradient& output, const Tensor& input, const Tensor& weight,
                            const std::optional<Prologue>& prologue, const ConvShape& s,
                            DType dtype, const WinogradPlan& plan, bool needs_input,
                            bool needs_weight) {
  const Tensor dzt = output.compute();
  Gradients gradients;
  if (needs_weight && plan.weight) {
    gradients.weight = winograd_weight_gradient(dzt, input, weight, prologue, s, dtype);
  }
  if (needs_input && plan.input) {
    gradients.input = winograd_input_gradient(dzt, weight, s, dtype, *plan.input);
  }
  const bool input_left = needs_input && !gradients.input.has_value();
  const bool weight_left = needs_weight && !gradients.weight.has_value();
  if (input_left || weight_left) {
    const Tensor a = prologue && weight_left ? prologue->apply(input) : input;
    const auto [da, dweight] = convolution_backward(dzt, a, weight, s, input_left, weight_left);
    if (input_left) gradients.input = as_channels_last(*da);
    if (weight_left) gradients.weight = dweight;
  }
  if (prologue && needs_input) {
    const RowSums sums = prologue->backward(*gradients.input, input);
    gradients.vectors = BatchNormGradients(prologue->bn, sums[0], sums[1]);
  }
  return gradients;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_stats_backward(
    const Tensor& dz, const Tensor& dmean, const Tensor& dvar, const Tensor& input,
    const Tensor& weight, const Tensor& z, const Tensor& mean, const OptionalTensor& in_mean,
    const OptionalTensor& in_var, const OptionalTensor& in_weight, const OptionalTensor& in_bias,
    double in_eps, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool needs_input, bool needs_weight) {
  const DType dtype = check_images(kOp, "input", input);
  const ScalarType type = input.scalar_type();
  ConvShape conv{};
  conv.stride = check_pair(kOp, "stride", stride, 1);
  conv.padding = check_pair(kOp, "padding", padding, 0);
  conv.dilation = check_pair(kOp, "dilation", dilation, 1);
  conv.groups = groups;
  check_cpu(kOp, "z", z);
  check_same_dtype(kOp, "z", z, "input", input);
  check_convolution(input, weight, z, conv);
  check_like(kOp, "dz", dz, "z", z);
  const auto out_vector = [&](const char* name, const Tensor& t) {
    return check_channel_vector(kOp, name, t, z.size(1), type);
  };
  const Tensor dmean_vector = out_vector("dmean", dmean);
  const Tensor dvar_vector = out_vector("dvar", dvar);
  const Tensor mean_vector = out_vector("mean", mean);

  const Tensor input_rows = as_channels_last(input);
  std::optional<Prologue> prologue;
  if (in_mean.has_value() != in_var.has_value()) {
    fail(kOp, "in_mean and in_var must be given together, got one of them only");
  }
  if (!in_mean.has_value() && (in_weight.has_value() || in_bias.has_value())) {
    fail(kOp, in_weight.has_value() ? "in_weight" : "in_bias",
         " must be None where in_mean is None, got a tensor");
  }
  if (in_mean.has_value()) {
    const auto in_vector = [&](const char* name, const auto& t) {
      return check_channel_vector(kOp, name, t, input.size(1), type);
    };
    prologue.emplace(
        BatchNorm(in_vector("in_mean", *in_mean), in_vector("in_var", *in_var),
                  in_vector("in_weight", in_weight), in_vector("in_bias", in_bias), in_eps),
        input_rows, dtype);
  }

  Tensor dinput = empty_vector(0, type), dweight = empty_vector(0, type);
  BatchNormGradients vectors;
  if (needs_input || needs_weight) {
    const OutputGradient output(dz, dmean_vector, dvar_vector, z, mean_vector, dtype);
    Gradients gradients;
    bool input_left = needs_input;
    if (needs_input && input_by_amx(conv, dtype)) {
      if (auto found = amx_input_gradient(output, input_rows, weight, prologue, conv, dtype)) {
        gradients = std::move(*found);
        input_left = false;
      }
    }
    const bool by_gemm = gemm_is_faster(input, weight, z, conv);
    const bool by_amx = needs_weight && weight_by_amx(conv, dtype, input_left && by_gemm);
    const bool weight_left = needs_weight && !by_amx;
    if (input_left || weight_left) {
      const WinogradPlan winograd = plan_winograd(conv, dtype);
      Gradients others;
      if ((winograd.weight && weight_left) || (winograd.input && input_left)) {
        others = backward_winograd(output, input_rows, weight, prologue, conv, dtype, winograd,
                                   input_left, weight_left);
      } else if (by_gemm) {
        others =
            backward_gemm(output, input_rows, weight, z, prologue, conv, input_left, weight_left);
      } else {
        others = backward_aten(output, input_rows, weight, prologue, conv, input_left, weight_left);
      }
      if (input_left)
        gradients = std::move(others);
      else
        gradients.weight = others.weight;
    }
    if (by_amx) {
      gradients.weight = amx_weight_gradient(output, input_rows, weight, prologue, conv, dtype);
    }
    if (needs_weight && !gradients.weight) {
      gradients.weight =
          backward_aten(output, input_rows, weight, prologue, conv, false, true).weight;
    }
    if (needs_input) dinput = *gradients.input;
    if (needs_weight) dweight = in_format_of(weight, *gradients.weight);
    vectors = gradients.vectors;
  }
  const auto result = [&](bool present, const std::vector<double>& values) {
    return present ? to_channel_vector(values, type) : empty_vector(0, parameter_dtype(type));
  };
  const bool prologue_gradients = prologue.has_value() && needs_input;
  return {dinput,
          dweight,
          result(prologue_gradients, vectors.mean),
          result(prologue_gradients, vectors.var),
          result(prologue_gradients && in_weight.has_value(), vectors.weight),
          result(prologue_gradients && in_bias.has_value(), vectors.bias)};
}

}  // namespace fastres::cpu
