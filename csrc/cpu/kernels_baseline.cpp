#define FASTRES_ISA baseline
#include "kernel_table.inl"
