#include "winograd_stem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "conv_algorithm.h"
#include "conv_blocks.h"
#include "memory.h"
#include "winograd_stem_kernel.h"

namespace fastres::cpu {
namespace {

int64_t tiles_across(const ConvShape& s) { return ceil_div(s.ow, kStemTile); }

// Over n, oh and the tiles across.
struct Plan {
  int64_t images, row_blocks, column_blocks;

  int64_t blocks() const { return images * row_blocks * column_blocks; }
};

// A block's input and its transforms stay in a second level cache of 512 KB.
constexpr int64_t kBlockTiles = 224, kMostAcross = 32;

int64_t rows_of_block(const ConvShape& s, int64_t column_blocks) {
  return std::max<int64_t>(1, kBlockTiles / ceil_div(tiles_across(s), column_blocks));
}

// Threads get equal numbers of blocks.
Plan make_plan(const ConvShape& s, int64_t threads) {
  Plan plan{s.n, 1, ceil_div(tiles_across(s), kMostAcross)};
  plan.row_blocks = ceil_div(s.oh, rows_of_block(s, plan.column_blocks));
  const Plan fewest = plan;
  while (plan.row_blocks < s.oh && plan.blocks() % threads != 0) ++plan.row_blocks;
  return plan.blocks() % threads == 0 || fewest.blocks() > threads ? plan : fewest;
}

// The rows of the convolution that a max-pool's rows are computed from: as many as a block has, and
// before them those that were computed already.
struct Band {
  int64_t column_blocks, rows, row_elements;

  Band(const ConvShape& s, const PoolGeometry& pool)
      : column_blocks(ceil_div(tiles_across(s), kMostAcross)),
        rows(rows_of_block(s, column_blocks)),
        row_elements(s.ow * s.co),
        height_(rows + pool.kh - 1) {}

  int64_t bytes(int64_t element) const { return height_ * row_elements * element; }

 private:
  int64_t height_;
};

int64_t element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace

bool is_winograd_stem(const ConvShape& s) {
  return s.kw == kStemTaps && s.stride[1] == 2 && s.dilation[0] == 1 && s.dilation[1] == 1 &&
         s.groups == 1 && s.ci > 0 && s.ci <= kStemChannels && s.co > 0 && s.co % kConvPanel == 0;
}

int64_t winograd_stem_packed_floats(const ConvShape& s) {
  return s.panels() * stem_panel_floats(s.kh, s.ci);
}

void winograd_stem_pack(const ConvWeight& weight, float* packed) {
  kernels().stem_pack(weight, packed, 0, weight.co / kConvPanel);
}

double winograd_stem_cost(const ConvShape& s, bool packing) {
  constexpr double pack_cost = 15.0;
  const double tiles = static_cast<double>(s.n * s.oh * tiles_across(s));
  const double weights = static_cast<double>(kStemProducts * s.kh * s.ci * s.co);
  // Each row of the kernel reads a transformed line, which as many rows share as the stride leaves.
  const double transforms = 25.0 * s.co + 200.0 * s.ci * std::min(s.stride[0], s.kh);
  return weights * (tiles + (packing ? kReadCost + pack_cost : cold_read_cost())) +
         tiles * transforms;
}

std::optional<std::vector<double>> run_winograd_stem(ConvArgs args, const ConvShape& s, DType dtype,
                                                     bool statistics) {
  set_sizes(args, s);
  const Plan plan = make_plan(s, torch::stable::get_num_threads());
  const int64_t across = tiles_across(s);
  const StemLayout largest(ceil_div(s.oh, plan.row_blocks), ceil_div(across, plan.column_blocks),
                           s.kh, s.stride[0], s.ci);
  const auto kernel = kernels().stem_block[static_cast<int>(dtype)];
  const auto scratch = [&] { return scratch_floats(largest.floats(s.ci)); };
  const auto run = [&](const Scratch& memory, int64_t, int64_t index, double* sums) {
    const int64_t w = index % plan.column_blocks;
    const int64_t h = index / plan.column_blocks % plan.row_blocks;
    const StemBlock block{.n = index / plan.column_blocks / plan.row_blocks,
                          .h0 = cut(s.oh, h, plan.row_blocks),
                          .h1 = cut(s.oh, h + 1, plan.row_blocks),
                          .tile0 = cut(across, w, plan.column_blocks),
                          .tile1 = cut(across, w + 1, plan.column_blocks),
                          .origin = 0};
    return kernel(args, block, memory.floats(), sums);
  };
  return run_blocks(1, plan.blocks(), statistics ? kConvSums * s.co : 0, scratch, run);
}

bool winograd_stem_pools(const ConvShape& s, const PoolGeometry& pool, DType dtype) {
  // Beside a block's scratch in a second level cache of 2 MB.
  constexpr int64_t most_bytes = 1024 * 1024;
  return Band(s, pool).bytes(element_bytes(dtype)) <= most_bytes;
}

bool run_winograd_stem_pool(ConvArgs args, const ConvShape& s, const PoolGeometry& pool,
                            DType dtype) {
  set_sizes(args, s);
  const Band band(s, pool);
  const int64_t across = tiles_across(s);
  const int64_t element = element_bytes(dtype);
  const int64_t row_bytes = band.row_elements * element;
  const StemLayout largest(band.rows, ceil_div(across, band.column_blocks), s.kh, s.stride[0],
                           s.ci);
  // Parts of an image have rows at their seams that both compute.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t parts = 1;  // of each image
  while (parts < pool.oh && s.n * parts % threads != 0) ++parts;
  const bool stream = args.stream;
  const auto convolve = kernels().stem_block[static_cast<int>(dtype)];
  const auto take_maxima = kernels().max_pool2d[static_cast<int>(dtype)][false];
  struct Memory {
    Scratch transforms, band;
  };
  const auto scratch = [&] {
    return Memory{scratch_floats(largest.floats(s.ci)),
                  Scratch(static_cast<size_t>(band.bytes(element)))};
  };
  const auto run = [&](const Memory& memory, int64_t, int64_t index, double*) {
    const int64_t n = index / parts, part = index % parts;
    const int64_t end = cut(pool.oh, part + 1, parts);
    // The convolution's rows that a row of the pool is taken from.
    const auto first_row = [&](int64_t h) {
      return std::max<int64_t>(h * pool.stride_h - pool.pad_h, 0);
    };
    const auto last_row = [&](int64_t h) {
      return std::min(h * pool.stride_h - pool.pad_h + pool.kh, s.oh);
    };
    char* rows = reinterpret_cast<char*>(memory.band.floats());
    int64_t done = cut(pool.oh, part, parts);       // rows of the pool
    int64_t begin = first_row(done), next = begin;  // the band has rows [begin, next)
    bool finite = true;
    while (done < end) {
      const int64_t next_end = std::min(next + band.rows, last_row(end - 1));
      ConvArgs block_args = args;
      block_args.output = rows;
      block_args.stream = false;
      for (int64_t w = 0; w < band.column_blocks; ++w) {
        const StemBlock block{.n = n,
                              .h0 = next,
                              .h1 = next_end,
                              .tile0 = cut(across, w, band.column_blocks),
                              .tile1 = cut(across, w + 1, band.column_blocks),
                              .origin = (n * s.oh + begin) * band.row_elements};
        finite &= convolve(block_args, block, memory.transforms.floats(), nullptr);
      }
      next = next_end;
      int64_t whole = done;  // up to where all windows' rows are there
      while (whole < end && last_row(whole) <= next) ++whole;
      if (whole > done) {
        // They begin in the band, or above the image.
        const int64_t above = begin + pool.pad_h - done * pool.stride_h;
        MaxPoolArgs windows{};
        windows.geometry = pool;
        windows.geometry.n = 1;
        windows.geometry.ih = next - begin + std::min<int64_t>(above, 0);
        windows.geometry.oh = whole - done;
        windows.geometry.pad_h = std::max<int64_t>(above, 0);
        windows.input = rows + std::max<int64_t>(-above, 0) * row_bytes;
        windows.output =
            static_cast<char*>(args.output) + (n * pool.oh + done) * pool.ow * pool.c * element;
        windows.stream = stream;
        take_maxima(windows, 0, whole - done);
        done = whole;
      }
      const int64_t keep = std::min(first_row(done), next);
      std::memmove(rows, rows + (keep - begin) * row_bytes,
                   static_cast<size_t>((next - keep) * row_bytes));
      begin = keep;
    }
    return finite;
  };
  return run_blocks(1, s.n * parts, 0, scratch, run).has_value();
}

}  // namespace fastres::cpu
