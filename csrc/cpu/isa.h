// Run-time choice of the CPU instruction set.
#pragma once

#include <string>
#include <vector>

#include "visibility.h"

namespace fastres::cpu {

// amx is avx512 with convolutions on the matrix unit.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

FASTRES_EXPORTED const char* isa_name(Isa isa);

// The best instruction set that processor, operating system and this build support.
Isa hardware_isa();

// hardware_isa(), bounded above by the environment variable FASTRES_CPU_CAPABILITY
// (baseline, avx2, avx512 or amx), read once. Throws std::runtime_error on any other value.
FASTRES_EXPORTED Isa current_isa();

// Names of all the instruction sets that can be chosen on this machine, slowest first.
FASTRES_EXPORTED std::vector<std::string> available_isas();

}  // namespace fastres::cpu
