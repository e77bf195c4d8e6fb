#include "conv_backward_gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "team.h"
#include "tensor_checks.h"

namespace fastres::cpu {
namespace {

// A float32 matrix over memory that somebody else owns.
Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride) {
  const std::array<int64_t, 2> sizes = {rows, columns}, strides = {row_stride, column_stride};
  return torch::stable::from_blob(const_cast<float*>(data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Float);
}

// out = a @ b, or out += a @ b. These functions do not go through the dispatcher, whose
// thread-local state is not that of the caller in a thread of parallel_for.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      accumulate ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0)
                 : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

std::unique_ptr<float[]> floats(int64_t n) { return std::make_unique_for_overwrite<float[]>(n); }

}  // namespace

bool ConvBackwardGemm::pointwise() const {
  const ConvGeometry& g = geometry;
  return g.kh == 1 && g.kw == 1 && g.pad_h == 0 && g.pad_w == 0 && g.stride_h == 1 &&
         g.stride_w == 1;
}

void ConvBackwardGemm::run_part(int64_t begin, int64_t end, int64_t block_rows, float* part_dweight,
                                double* part_sums) const {
  const ConvGeometry& g = geometry;
  const int64_t taps = g.kh * g.kw * g.ci;
  const bool pointwise = this->pointwise();
  const bool gathers = dweight != nullptr && (!pointwise || in_mean != nullptr);
  const bool scatters = dinput != nullptr && (!pointwise || in_mean != nullptr);
  const auto dzt_block = floats(dzt == nullptr ? block_rows * g.co : 0);
  const auto columns = floats(gathers || scatters ? block_rows * taps : 0);
  const auto workspace = floats(part_sums != nullptr ? 2 * in_period : 0);
  std::vector<double> block_sums(part_sums != nullptr ? 2 * in_period : 0);
  const GatherArgs gather{g, input, in_mean, in_scale, in_bias};

  for (int64_t row = begin; row < end; row += block_rows) {
    const int64_t rows = std::min(block_rows, end - row);
    const float* block_dzt = dzt + row * g.co;
    if (dzt == nullptr) {
      BnStatsBackwardArgs args = dzt_args;
      args.dz = static_cast<const float*>(args.dz) + row * g.co;
      args.z = static_cast<const float*>(args.z) + row * g.co;
      args.dzt = dzt_block.get();
      kernels().bn_stats_backward[static_cast<int>(DType::float32)](args, 0, rows * g.co);
      block_dzt = dzt_block.get();
    }
    if (dweight != nullptr) {
      const float* block_columns = input + row * g.ci;
      if (gathers) {
        kernels().conv_gather(gather, row, row + rows, columns.get());
        block_columns = columns.get();
      }
      multiply(matrix(part_dweight, g.co, taps, taps, 1), matrix(block_dzt, g.co, rows, 1, g.co),
               matrix(block_columns, rows, taps, taps, 1), row != begin);
    }
    if (dinput == nullptr) continue;
    float* block_da = scatters ? columns.get() : dinput + row * g.ci;
    multiply(matrix(block_da, rows, taps, taps, 1), matrix(block_dzt, rows, g.co, g.co, 1),
             matrix(weight, g.co, taps, taps, 1), false);
    if (!pointwise) {
      kernels().conv_scatter_add(g, row, row + rows, block_da, dinput);
    } else if (in_mean != nullptr) {
      BnAddReluBackwardArgs args{};
      args.dy = block_da;
      args.z = input + row * g.ci;
      args.dz = dinput + row * g.ci;
      args.mean = in_mean;
      args.scale = in_scale;
      args.bias = in_bias;
      args.period = in_period;
      args.sums = block_sums.data();
      args.workspace = workspace.get();
      kernels().prologue_backward[static_cast<int>(DType::float32)](args, 0, rows * g.ci);
      for (int64_t i = 0; i < 2 * in_period; ++i) part_sums[i] += block_sums[i];
    }
  }
}

void ConvBackwardGemm::run() const {
  const ConvGeometry& g = geometry;
  const int64_t rows = g.n * g.oh * g.ow;
  const int64_t weights = g.co * g.kh * g.kw * g.ci;
  const int64_t row_floats = g.co + g.ci + g.kh * g.kw * g.ci;
  const int64_t threads = thread_count();
  // A block fills half of a large second-level cache, and is tall enough for its products.
  constexpr int64_t block_floats = 256 * 1024;
  // Each part has a gradient of the weight of its own: not for few rows, nor in too much memory.
  constexpr int64_t fewest_rows = 128, part_floats = 64 * 1024 * 1024;
  // Where blocks add to dinput, parts are of whole images: no two add to the same pixel.
  const int64_t unit = dinput != nullptr && !pointwise() ? g.oh * g.ow : 1;
  const int64_t most_parts = std::max<int64_t>(
      1, std::min({rows / fewest_rows, part_floats / std::max<int64_t>(weights, 1), rows / unit,
                   threads}));
  const int64_t part_rows = (rows / unit + most_parts - 1) / most_parts * unit;
  const int64_t parts = (rows + part_rows - 1) / part_rows;
  const int64_t block_rows =
      std::min(std::clamp<int64_t>(block_floats / row_floats, 256, 1024), part_rows);

  const auto spare_dweight = floats(dweight != nullptr ? (parts - 1) * weights : 0);
  std::vector<double> sums(in_sums != nullptr ? parts * 2 * in_period : 0);
  parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      run_part(std::min(part * part_rows, rows), std::min((part + 1) * part_rows, rows), block_rows,
               part == 0 ? dweight : spare_dweight.get() + (part - 1) * weights,
               in_sums != nullptr ? sums.data() + part * 2 * in_period : nullptr);
    }
  });

  if (dweight != nullptr && parts > 1) {
    parallel_for(0, weights, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part) {
        const float* values = spare_dweight.get() + (part - 1) * weights;
        for (int64_t i = begin; i < end; ++i) dweight[i] += values[i];
      }
    });
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) % (2 * in_period);
    in_sums[at] = i < static_cast<size_t>(2 * in_period) ? sums[i] : in_sums[at] + sums[i];
  }
}

}  // namespace fastres::cpu
