#include "conv_algorithm.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "conv_amx.h"
#include "conv_blocks.h"
#include "conv_digits.h"
#include "isa.h"
#include "winograd.h"
#include "winograd_stem.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastres::cpu {
namespace {

constexpr const char* kNames[] = {"winograd4", "winograd2", "digits", "amx", "packed", "aten"};

// Kernels of so many numbers are read from memory: fewer positions are better than fewer products.
constexpr int64_t kManyKernels = 256 * 256;

// Whether the processor has dot products of this 16-bit type, with which torch's convolution
// outruns ours in float32. (float16 arithmetic without dot products, AVX512_FP16, does not.)
bool has_dot_products([[maybe_unused]] DType dtype) {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) == 0) return false;
  if (dtype == DType::bfloat16) return (a >> 5 & 1) != 0;  // AVX512_BF16
  if (dtype == DType::float16) return (a >> 21 & 1) != 0;  // AMX_FP16
#endif
  return false;
}

// Multiply-adds of a call of the implicit GEMM, that makes `speed` of them in the time of one.
double direct_cost(const ConvShape& s, bool packing, double speed = 1.0) {
  constexpr double pack_cost = 8.0;  // of a weight
  const double weights = static_cast<double>(s.kh * s.kw * s.ci * s.co);
  return weights * (s.pixels() / speed + (packing ? kReadCost + pack_cost : cold_read_cost()));
}

}  // namespace

const char* algorithm_name(Algorithm a) { return kNames[static_cast<int>(a)]; }

bool winograd_takes(const ConvShape& s, Algorithm a) {
  return winograd_fits(s) ||
         (winograd_allowed() && a == Algorithm::winograd4 && is_winograd_stem(s));
}

std::optional<Algorithm> algorithm_from_environment() {
  const char* value = std::getenv("FASTRES_CPU_ALGORITHM");
  if (value == nullptr || *value == '\0') return std::nullopt;
  for (int a = 0; a < static_cast<int>(std::size(kNames)); ++a) {
    if (std::string(value) == kNames[a]) return static_cast<Algorithm>(a);
  }
  throw std::runtime_error(
      std::string(
          "FASTRES_CPU_ALGORITHM must be winograd4, winograd2, digits, amx, packed or aten, "
          "got '") +
      value + "'");
}

bool torch_is_faster(DType dtype) {
  static const bool dot_products[kDTypes] = {false, has_dot_products(DType::bfloat16),
                                             has_dot_products(DType::float16), false};
  if (dot_products[static_cast<int>(dtype)]) return true;
#if defined(__x86_64__)
  // torch's own kernels use what the machine has; without FMA ours have no edge.
  if (current_isa() == Isa::baseline) return true;
#endif
  return false;
}

double cold_read_cost() {
  // As measured on Sapphire Rapids, which has a matrix unit, and on Zen 4, whose memory is as fast
  // beside slower arithmetic.
  return has_matrix_unit() ? 50.0 : 8.0;
}

Algorithm cheapest_algorithm(const ConvShape& s, bool packing) {
  std::optional<Algorithm> named = algorithm_from_environment();
  if (named == Algorithm::digits && (packing || !digits_take(s))) named = Algorithm::amx;
  if (named && (is_winograd(*named) ? winograd_takes(s, *named)
                                    : *named != Algorithm::amx || has_matrix_unit())) {
    return *named == Algorithm::aten ? Algorithm::packed : *named;
  }
  const bool amx = has_matrix_unit() && amx_pays(s);
  // Who names another algorithm means, where that can't, the plain one; and graphs, which pack
  // without a size, may do so in every call.
  const bool digits = amx && !packing && !named && s.n > 0 && digits_take(s);
  const Algorithm direct = digits ? Algorithm::digits : amx ? Algorithm::amx : Algorithm::packed;
  if (!amx && is_winograd_stem(s) && winograd_takes(s, Algorithm::winograd4)) {
    return s.n == 0 || winograd_stem_cost(s, packing) < direct_cost(s, packing)
               ? Algorithm::winograd4
               : direct;
  }
  if (!winograd_fits(s) || (s.n == 0 && (amx || s.stride[0] != 1))) return direct;
  if (s.n == 0) return s.ci * s.co < kManyKernels ? Algorithm::winograd4 : Algorithm::winograd2;
  // What the matrix unit gains over multiply-adds, as measured beside Winograd's algorithm. Pixels
  // are made digits once for all output channels.
  const double digits_speed = 1.0 / (1.0 / 4.1 + 2.9 / static_cast<double>(s.co));
  const double cost = direct_cost(s, packing, digits ? digits_speed : amx ? 2.9 : 1.0);
  const double with4 = winograd_cost(s, 4, packing), with2 = winograd_cost(s, 2, packing);
  if (cost <= std::min(with4, with2)) return direct;
  return with4 <= with2 ? Algorithm::winograd4 : Algorithm::winograd2;
}

}  // namespace fastres::cpu
