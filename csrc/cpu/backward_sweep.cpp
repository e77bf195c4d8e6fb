#include "backward_sweep.h"

#include <algorithm>
#include <bit>
#include <memory>

#include "team.h"

namespace fastres::cpu {

RowSums backward_sweep(const ChannelRows& rows, BnAddReluBackwardFn kernel,
                       const BnAddReluBackwardArgs& args) {
  RowSums totals;
  for (auto& total : totals) total.assign(rows.channels, 0.0);
  if (rows.numel == 0) return totals;

  const int sums = args.residual != nullptr ? 3 : 2;
  const int64_t most = std::min({int64_t{128}, rows.tiled_rows / 16, rows.numel / kGrainElements});
  const int64_t chunks = std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(1, most)));
  const int64_t chunk_sums = sums * rows.period;
  const auto partial = std::make_unique_for_overwrite<double[]>(chunks * chunk_sums);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const auto workspace = std::make_unique_for_overwrite<char[]>(chunk_sums * rows.scalar_bytes());
    BnAddReluBackwardArgs chunk_args = args;
    chunk_args.workspace = workspace.get();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      chunk_args.sums = partial.get() + chunk * chunk_sums;
      kernel(chunk_args, rows.element(chunk * rows.tiled_rows / chunks),
             rows.element((chunk + 1) * rows.tiled_rows / chunks));
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* chunk_partial = partial.get() + chunk * chunk_sums;
    for (int sum = 0; sum < sums; ++sum) {
      double* total = totals[sum].data();
      for (int64_t tile = 0; tile < rows.period; tile += rows.channels) {
        const double* values = chunk_partial + sum * rows.period + tile;
        for (int64_t c = 0; c < rows.channels; ++c) total[c] += values[c];
      }
    }
  }
  return totals;
}

}  // namespace fastres::cpu
