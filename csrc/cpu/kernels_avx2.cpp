#if defined(__x86_64__)
#define FASTRES_ISA avx2
#include "kernel_table.inl"
#endif
