// One sweep over the rows that writes gradients and sums over rows: shared by bn_add_relu_backward
// and conv_stats_backward.
#pragma once

#include <array>
#include <vector>

#include "channel_rows.h"

namespace fastres::cpu {

// Sums over the rows, one value a channel: of g, g * (z - mean), g * (residual - residual_mean).
using RowSums = std::array<std::vector<double>, 3>;

// Runs the kernel on chunks of rows that depend on the shape only and adds their sums in order: the
// result has the same bits for every number of threads.
RowSums backward_sweep(const ChannelRows& rows, BnAddReluBackwardFn kernel,
                       const BnAddReluBackwardArgs& args);

}  // namespace fastres::cpu
