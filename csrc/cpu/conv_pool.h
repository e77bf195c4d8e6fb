// A convolution and a max-pool of its result, which takes its windows from rows that have just been
// computed: the convolution's result is never in memory as a whole.
#pragma once

#include <algorithm>
#include <cstring>

#include "conv_blocks.h"
#include "kernel_table.h"
#include "memory.h"
#include "team.h"

namespace fastres::cpu {

// Bytes of a number, of the dtypes that our convolutions take.
constexpr int64_t element_bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// The rows of the convolution that are in memory: as many as are computed at a time, and before
// them those that a window had to wait with.
struct PoolBand {
  int64_t rows, row_elements, element_bytes;
  int64_t bytes;

  PoolBand(const ConvShape& s, const PoolGeometry& pool, DType dtype, int64_t rows_)
      : rows(rows_),
        row_elements(s.ow * s.co),
        element_bytes(element_bytes_of(dtype)),
        bytes((rows + pool.kh - 1) * row_bytes()) {}

  int64_t row_bytes() const { return row_elements * element_bytes; }
  // Beside what a block of the convolution takes, in a second level cache of 2 MB.
  bool fits() const { return bytes <= 1024 * 1024; }
};

// `memory()` makes what a thread needs for the convolution. `convolve(memory, n, h0, h1, rows,
// origin)` computes rows [h0, h1) of image n, at most a band's, without a residual; `rows` is where
// element `origin` of the convolution's result is. It says whether all of it is finite; false where
// some was not, and the pool may be wrong.
template <typename MakeMemory, typename Convolve>
bool run_pooled(const ConvShape& s, const PoolGeometry& pool, DType dtype, const PoolBand& band,
                void* output, bool stream, const MakeMemory& memory, const Convolve& convolve) {
  // Parts of an image have rows at their seams that both compute.
  const int64_t threads = thread_count(), row_bytes = band.row_bytes();
  int64_t parts = 1;  // of each image
  while (parts < pool.oh && s.n * parts % threads != 0) ++parts;
  const auto take_maxima = kernels().max_pool2d[static_cast<int>(dtype)][false];
  const auto scratch = [&] {
    return std::pair(memory(), Scratch(static_cast<size_t>(band.bytes)));
  };
  const auto run = [&](auto& given, int64_t, int64_t index, double*) {
    const int64_t n = index / parts, part = index % parts;
    const int64_t end = cut(pool.oh, part + 1, parts);
    // The convolution's rows that a row of the pool is taken from.
    const auto first_row = [&](int64_t h) {
      return std::max<int64_t>(h * pool.stride_h - pool.pad_h, 0);
    };
    const auto last_row = [&](int64_t h) {
      return std::min(h * pool.stride_h - pool.pad_h + pool.kh, s.oh);
    };
    char* rows = reinterpret_cast<char*>(given.second.floats());
    int64_t done = cut(pool.oh, part, parts);       // rows of the pool
    int64_t begin = first_row(done), next = begin;  // the band has rows [begin, next)
    bool finite = true;
    while (done < end) {
      const int64_t next_end = std::min(next + band.rows, last_row(end - 1));
      finite &=
          convolve(given.first, n, next, next_end, rows, (n * s.oh + begin) * band.row_elements);
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
        windows.output = static_cast<char*>(output) +
                         (n * pool.oh + done) * pool.ow * pool.c * band.element_bytes;
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
