#if defined(__x86_64__)
#define FASTRES_ISA avx512
#include "kernel_table.inl"
#endif
