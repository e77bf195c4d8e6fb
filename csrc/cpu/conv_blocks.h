// How a convolution's work is cut among threads, and how their sums are joined.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "conv_shape.h"
#include "team.h"

namespace fastres::cpu {

// What reading a packed weight costs, in multiply-adds, when it was used just before.
inline constexpr double kReadCost = 10.0;

// Where part `i` of `count` about equal parts begins.
inline int64_t cut(int64_t size, int64_t i, int64_t count) { return size * i / count; }

// Panels [first, last) of a channel group, cut at pairs of panels where a register tile of
// `columns` channels holds two.
inline std::pair<int64_t, int64_t> panels_of_group(const ConvShape& s, int columns, int64_t group,
                                                   int64_t groups) {
  const int64_t step = std::max<int64_t>(1, columns / kConvPanel);
  const int64_t steps = ceil_div(s.panels(), step);
  return {cut(steps, group, groups) * step,
          std::min(cut(steps, group + 1, groups) * step, s.panels())};
}

// The total of `blocks` times `size` sums, in the order of the blocks, whichever thread made them.
inline std::vector<double> total_of_blocks(std::vector<double> sums, int64_t blocks, int64_t size) {
  for (int64_t block = 1; block < blocks; ++block) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[block * size + i];
  }
  sums.resize(size);
  return sums;
}

// Runs the blocks of pixels of every channel group in torch's threads. `scratch()` makes a thread's
// scratch, `run(scratch, group, block, sums)` computes a block and says whether its results are
// finite. Returns the blocks' total of `sums_of_block` sums, nothing where a block was not finite.
template <typename MakeScratch, typename Run>
std::optional<std::vector<double>> run_blocks(int64_t groups, int64_t blocks, int64_t sums_of_block,
                                              const MakeScratch& scratch, const Run& run) {
  std::vector<double> sums(blocks * sums_of_block);
  std::atomic<bool> finite = true;
  // Blocks of one channel group follow each other: their weights stay in the cache. A thread has
  // the same part of every layer's pixels, which its cache may hold; with its own blocks done it
  // takes the next of a thread that something else holds up.
  const int64_t tasks = groups * blocks;
  const int64_t threads = std::min<int64_t>(thread_count(), tasks);
  std::vector<std::atomic<int64_t>> next(threads);
  for (int64_t t = 0; t < threads; ++t) next[t] = cut(tasks, t, threads);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    auto memory = scratch();
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t t = (first + i) % threads, end = cut(tasks, t + 1, threads);
      for (int64_t task = next[t]++; task < end; task = next[t]++) {
        const int64_t group = task / blocks, block = task % blocks;
        double* block_sums = sums_of_block > 0 ? sums.data() + block * sums_of_block : nullptr;
        if (!run(memory, group, block, block_sums)) finite = false;
      }
    }
  });
  if (!finite) return std::nullopt;
  return total_of_blocks(std::move(sums), blocks, sums_of_block);
}

// A (co, ci, kh, kw) float32 weight, of any strides.
inline ConvWeight conv_weight_of(const torch::stable::Tensor& weight) {
  return {.data = static_cast<const float*>(weight.const_data_ptr()),
          .stride_o = weight.stride(0),
          .stride_i = weight.stride(1),
          .stride_h = weight.stride(2),
          .stride_w = weight.stride(3),
          .co = weight.size(0),
          .ci = weight.size(1),
          .kh = weight.size(2),
          .kw = weight.size(3)};
}

// The weight of the convolution `t` that takes a gradient back to its input: `last`, then every
// `step`-th tap before it, with inputs and outputs exchanged.
inline ConvWeight turned(const ConvWeight& weight, const ConvShape& t,
                         const std::array<int64_t, 2>& last, const std::array<int64_t, 2>& step) {
  return {.data = weight.data + last[0] * weight.stride_h + last[1] * weight.stride_w,
          .stride_o = weight.stride_i,
          .stride_i = weight.stride_o,
          .stride_h = -step[0] * weight.stride_h,
          .stride_w = -step[1] * weight.stride_w,
          .co = t.co,
          .ci = t.ci,
          .kh = t.kh,
          .kw = t.kw};
}

// Weights into panels, by one of the kernels that pack them.
void pack_panels(const ConvWeight& weight, ConvPackFn kernel, float* packed);

// Whether the convolution is a matrix product of pixels' channels.
inline bool is_pointwise(const ConvShape& s) {
  return s.kh == 1 && s.kw == 1 && s.padding[0] == 0 && s.padding[1] == 0;
}

// Makes a pointwise convolution one without a stride: rows and columns that the stride leaves out
// need not be looked at. Returns whether its input pixels are then one after the other.
inline bool drop_stride(ConvArgs& args, ConvShape& s) {
  args.input_stride_h *= s.stride[0];
  args.input_stride_w *= s.stride[1];
  s.stride = {1, 1};
  s.ih = s.oh;
  s.iw = s.ow;
  return args.input_stride_h == s.iw * args.input_stride_w &&
         args.input_stride_n == s.ih * args.input_stride_h;
}

// Everything that args say about sizes.
inline void set_sizes(ConvArgs& args, const ConvShape& s) {
  args.n = s.n;
  args.ih = s.ih;
  args.iw = s.iw;
  args.ci = s.ci;
  args.oh = s.oh;
  args.ow = s.ow;
  args.co = s.co;
  args.kh = s.kh;
  args.kw = s.kw;
  args.stride_h = s.stride[0];
  args.stride_w = s.stride[1];
  args.pad_h = s.padding[0];
  args.pad_w = s.padding[1];
}

}  // namespace fastres::cpu
