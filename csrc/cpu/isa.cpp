#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastres::cpu {
namespace {

constexpr Isa kAllIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx};

Isa upper_bound_from_environment() {
  const char* value = std::getenv("FASTRES_CPU_CAPABILITY");
  if (value == nullptr || *value == '\0') return Isa::amx;
  for (const Isa isa : kAllIsas) {
    if (std::string(value) == isa_name(isa)) return isa;
  }
  throw std::runtime_error(
      std::string("FASTRES_CPU_CAPABILITY must be baseline, avx2, avx512 or amx, got '") + value +
      "'");
}

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16 and of bytes, rounds to the one and permutes
// the other, and Linux lets this process do so.
bool has_amx() {
#if defined(__linux__)
  // Of cpuid's leaf 7.
  constexpr unsigned unit = 1u << 22 | 1u << 24 | 1u << 25, permutations = 1u << 1;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & unit) != unit ||
      (c & permutations) == 0) {
    return false;
  }
  constexpr unsigned conversions = 1u << 5;  // of the leaf's second part
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0 || (a & conversions) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

Isa hardware_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return has_amx() ? Isa::amx : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa current_isa() {
  static const Isa isa = std::min(hardware_isa(), upper_bound_from_environment());
  return isa;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kAllIsas) {
    if (isa <= hardware_isa()) names.emplace_back(isa_name(isa));
  }
  return names;
}

const KernelTable& kernels() {
  static const KernelTable& table = []() -> const KernelTable& {
    switch (current_isa()) {
#if defined(__x86_64__)
      case Isa::amx:
        return amx::table;
      case Isa::avx512:
        return avx512::table;
      case Isa::avx2:
        return avx2::table;
#endif
      default:
        return baseline::table;
    }
  }();
  return table;
}

}  // namespace fastres::cpu
