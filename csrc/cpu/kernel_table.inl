// Compiled once for each instruction set: a kernels_<isa>.cpp defines FASTRES_ISA and includes
// this. Everything in here lives in namespace fastres::cpu::<isa>. The *_kernel.inl files use no
// inline function or template of the standard library: the linker keeps one copy of such a function
// for all instruction sets, and it could be one that this processor cannot run.
#include "kernel_table.h"
#include "vec.h"

namespace fastres::cpu::FASTRES_ISA {

const KernelTable table = {
    .vector_bytes = kVecBytes,
};

}  // namespace fastres::cpu::FASTRES_ISA
