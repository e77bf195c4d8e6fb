#if defined(__x86_64__)
#define FASTRES_ISA amx
#include "kernel_table.inl"
#endif
