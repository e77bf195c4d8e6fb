// Several conv_bn_relu in one call, without the way through the dispatcher and back for each.
#include <algorithm>
#include <optional>

#include "conv_unit.h"
#include "max_pool2d.h"
#include "team.h"

namespace fastres::cpu {
namespace {

// A unit's part of the program, field by field as in fastres/ops/conv_chain.py. Results are
// numbered from 1; 0 is the input. Tensors are numbered from 0; -1 is none.
struct Unit {
  int64_t source, residual;
  int64_t weight, bias, running_mean, running_var, bn_weight, bn_bias, packed;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups, relu;
  // Of the max-pool after it; pool_h is 0 without one.
  int64_t pool_h, pool_w, pool_stride_h, pool_stride_w, pool_padding_h, pool_padding_w;
};

constexpr int64_t kFields = sizeof(Unit) / sizeof(int64_t);

}  // namespace

Tensor conv_chain(const Tensor& input, const std::vector<Tensor>& tensors,
                  const std::vector<int64_t>& program, const std::vector<double>& eps) {
  const char* op = "conv_chain";
  const int64_t size = static_cast<int64_t>(program.size()), units = size / kFields;
  if (units == 0 || size % kFields != 0) {
    fail(op, "program must have ", kFields, " integers for each of one or more units, got ", size);
  }
  if (static_cast<int64_t>(eps.size()) != units) {
    fail(op, "eps must have one number for each of ", units, " units, got ", eps.size());
  }
  const auto* unit = reinterpret_cast<const Unit*>(program.data());
  // The unit after which a result is of no use any more.
  std::vector<int64_t> last_use(units + 1, 0);
  for (int64_t i = 0; i < units; ++i) {
    const Unit& u = unit[i];
    const auto check_result = [&](const char* name, int64_t index, int64_t least) {
      if (index < least || index > i) {
        fail(op, name, " of unit ", i, " must be in [", least, ", ", i, "], got ", index);
      }
      if (index >= 0) last_use[index] = i;
    };
    check_result("source", u.source, 0);
    check_result("residual", u.residual, -1);
    const auto check_tensor = [&](const char* name, int64_t index, int64_t least) {
      const int64_t count = static_cast<int64_t>(tensors.size());
      if (index < least || index >= count) {
        fail(op, name, " of unit ", i, " must be in [", least, ", ", count, "), got ", index);
      }
    };
    check_tensor("weight", u.weight, 0);
    check_tensor("bias", u.bias, -1);
    check_tensor("running_mean", u.running_mean, 0);
    check_tensor("running_var", u.running_var, 0);
    check_tensor("bn_weight", u.bn_weight, -1);
    check_tensor("bn_bias", u.bn_bias, -1);
    check_tensor("packed", u.packed, -1);
  }

  check_images(op, "input", input);
  std::vector<std::array<int64_t, 4>> sizes = {
      {input.size(0), input.size(1), input.size(2), input.size(3)}};
  std::vector<ConvUnit> prepared;
  std::vector<std::optional<PoolGeometry>> pools(units);
  for (int64_t i = 0; i < units; ++i) {
    const Unit& u = unit[i];
    const auto given = [&](int64_t index) {
      return index < 0 ? OptionalTensor() : OptionalTensor(tensors[index]);
    };
    prepared.emplace_back(
        input, sizes[u.source], tensors[u.weight], given(u.bias), tensors[u.running_mean],
        tensors[u.running_var], given(u.bn_weight), given(u.bn_bias), eps[i],
        std::vector{u.stride_h, u.stride_w}, std::vector{u.padding_h, u.padding_w},
        std::vector{u.dilation_h, u.dilation_w}, u.groups, u.relu != 0, given(u.packed));
    sizes.push_back(prepared.back().output());
    if (u.pool_h != 0) {
      const PoolGeometry pool =
          check_pool(op, sizes.back(), {u.pool_h, u.pool_w}, {u.pool_stride_h, u.pool_stride_w},
                     {u.pool_padding_h, u.pool_padding_w});
      pools[i] = pool;
      sizes.back() = {pool.n, pool.c, pool.oh, pool.ow};
    }
  }
  std::vector<OptionalTensor> results(units + 1);
  results[0] = input;
  const auto compute = [&] {
    for (int64_t i = 0; i < units; ++i) {
      const Unit& u = unit[i];
      const Tensor& source = *results[u.source];
      const OptionalTensor residual = u.residual < 0 ? OptionalTensor() : results[u.residual];
      results[i + 1] = pools[i].has_value() ? prepared[i].run(source, residual, *pools[i])
                                            : prepared[i].run(source, residual);
      if (last_use[u.source] == i) results[u.source].reset();
      if (u.residual >= 0 && last_use[u.residual] == i) results[u.residual].reset();
    }
  };
  // In a team torch's own convolutions would have one thread.
  const bool ours = std::all_of(prepared.begin(), prepared.end(),
                                [](const ConvUnit& u) { return u.algorithm() != Algorithm::aten; });
  if (ours) {
    with_team(compute);
  } else {
    compute();
  }
  return *results[units];
}

}  // namespace fastres::cpu
