// Run-time choice of the CPU instruction set.
#pragma once

#include <string>
#include <vector>

namespace fastres::cpu {

// amx is avx512 with convolutions on the matrix unit.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

const char* isa_name(Isa isa);

// The best instruction set that processor, operating system and this build support.
Isa hardware_isa();

// hardware_isa(), bounded above by the environment variable FASTRES_CPU_CAPABILITY
// (baseline, avx2, avx512 or amx), read once. Throws std::runtime_error on any other value.
Isa current_isa();

// Names of all the instruction sets that can be chosen on this machine, slowest first.
std::vector<std::string> available_isas();

}  // namespace fastres::cpu
