#include "strassen.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "conv_algorithm.h"
#include "conv_blocks.h"
#include "memory.h"
#include "strassen_kernel.h"

namespace fastres::cpu {
namespace {

int64_t pairs_of(const ConvShape& s) { return s.n * strassen_pairs(s.oh * s.ow); }

int64_t groups_of(const ConvShape& s) { return s.co / kStrassenGroup; }

// The sums of a pair of pixels, and its results from the products.
double transform_cost(const ConvShape& s) { return 14.0 * s.ci + 20.0 * s.co; }

// What a product of all the pairs' channels needs for each kernel.
double kernel_cost(const ConvShape& s, double pairs, double read_cost) {
  return kStrassenProducts * (s.ci / 2) * (pairs + read_cost);
}

struct Plan {
  int64_t pair_blocks, channel_groups;
};

// A block's sums stay in a second level cache of 1 MB beside the kernels of a group.
Plan make_plan(const ConvShape& s, const KernelTable& table, int64_t threads) {
  constexpr int64_t block_floats = 96 * 1024;
  const int64_t rows = table.conv_rows;
  const int64_t pair_floats = kStrassenProducts * strassen_row(s.ci / 2);
  const int64_t most = std::clamp<int64_t>(block_floats / pair_floats / rows * rows, 24, 192);
  const int64_t pairs = pairs_of(s);
  Plan best{1, 1};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t groups = 1; groups <= std::min(threads, groups_of(s)); ++groups) {
    const int64_t chunks = ceil_div(threads, groups);
    const int64_t chunk_pairs = ceil_div(pairs, chunks);
    const int64_t blocks = ceil_div(chunk_pairs, most);
    const double columns = static_cast<double>(ceil_div(groups_of(s), groups) * kStrassenHalf);
    const double padded = static_cast<double>(ceil_div(chunk_pairs, rows) * rows);
    const double cost =
        columns * kernel_cost(s, padded, kReadCost * blocks) + transform_cost(s) * chunk_pairs;
    if (cost < best_cost) {
      best_cost = cost;
      best = {std::min(blocks * chunks, pairs), groups};
    }
  }
  return best;
}

}  // namespace

bool is_strassen(const ConvShape& s) {
  return is_pointwise(s) && s.groups == 1 && s.ci > 0 && s.ci % kStrassenHalf == 0 && s.co > 0 &&
         s.co % kStrassenGroup == 0;
}

int64_t strassen_packed_floats(const ConvShape& s) {
  return groups_of(s) * strassen_group_floats(s.ci);
}

void strassen_pack(const ConvWeight& weight, float* packed) {
  torch::stable::parallel_for(0, weight.co / kStrassenGroup, 1, [&](int64_t begin, int64_t end) {
    kernels().strassen_pack(weight, packed, begin, end);
  });
}

double strassen_cost(const ConvShape& s, bool packing) {
  constexpr double pack_cost = 20.0;
  const double pairs = static_cast<double>(pairs_of(s));
  return s.co / 2 * kernel_cost(s, pairs, packing ? kReadCost + pack_cost : cold_read_cost()) +
         transform_cost(s) * pairs;
}

std::optional<std::vector<double>> run_strassen(ConvArgs args, const ConvShape& s, DType dtype,
                                                bool statistics) {
  const KernelTable& table = kernels();
  set_sizes(args, s);
  const Plan plan = make_plan(s, table, torch::stable::get_num_threads());
  const int64_t pairs = pairs_of(s), block_pairs = ceil_div(pairs, plan.pair_blocks);
  const auto kernel = table.strassen_block[static_cast<int>(dtype)];
  const auto scratch = [&] {
    return scratch_floats(kStrassenProducts * strassen_stride(block_pairs, s.ci / 2));
  };
  const auto run = [&](const Scratch& memory, int64_t group, int64_t block, double* sums) {
    const StrassenBlock part{.pair0 = cut(pairs, block, plan.pair_blocks),
                             .pair1 = cut(pairs, block + 1, plan.pair_blocks),
                             .group0 = cut(groups_of(s), group, plan.channel_groups),
                             .group1 = cut(groups_of(s), group + 1, plan.channel_groups)};
    return kernel(args, part, memory.floats(), sums);
  };
  return run_blocks(plan.channel_groups, plan.pair_blocks, statistics ? kConvSums * s.co : 0,
                    scratch, run);
}

}  // namespace fastres::cpu
