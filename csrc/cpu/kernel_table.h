// The interface between the checked, threaded operators (<op>.cpp) and the torch-free loops
// (*_kernel.inl): plain structs and one table of function pointers for each instruction set.
#pragma once

#include <cstdint>

namespace fastres::cpu {

// Storage formats. Loops compute in float, for double in double.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Index of a storage format in the tables below.
enum class DType { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };
inline constexpr int kDTypes = 4;

struct KernelTable {
  int vector_bytes;
};

namespace baseline {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}

// The table of current_isa().
const KernelTable& kernels();

}  // namespace fastres::cpu
