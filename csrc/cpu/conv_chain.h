// Several conv_bn_relu in one call, without the way through the dispatcher and back for each.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "avg_pool_linear.h"
#include "conv_unit.h"

namespace fastres::cpu {

// A chain for inputs of some sizes, dtype and device, checked but for the vectors, which are read
// anew by every run, and so is the linear layer. Several threads may run it at once.
class ConvChain {
 public:
  // Arguments as the op has them.
  ConvChain(const Tensor& input, const std::vector<Tensor>& tensors,
            const std::vector<int64_t>& program, const std::vector<double>& eps,
            const OptionalTensor& fc_weight, const OptionalTensor& fc_bias);

  // Fails where the input is not as the one before.
  Tensor run(const Tensor& input) const;

 private:
  using Sizes = std::array<int64_t, 4>;

  // Results are numbered from 1; 0 is the input.
  struct Step {
    ConvUnit unit;
    int64_t source, residual;  // -1: none
    std::optional<PoolGeometry> pool;
    // The step after which its result is of no use any more, which memory holds it till then, and
    // where its folded vectors are.
    int64_t last_use = 0, memory = -1, folded = 0;
  };

  const PoolGeometry* pool_of(const Step& step) const {
    return step.pool.has_value() ? &*step.pool : nullptr;
  }
  void assign_memory();
  Tensor run_ours(const Tensor& input, const AvgPoolLinear* head) const;
  Tensor run_any(const Tensor& input, const AvgPoolLinear* head) const;

  DType dtype_;
  ScalarType type_;
  std::vector<Sizes> sizes_;  // of the results
  std::vector<Step> steps_;
  std::vector<int64_t> memories_;  // their elements
  OptionalTensor fc_weight_, fc_bias_;
  int64_t folded_floats_ = 0;
  bool ours_ = true;
};

}  // namespace fastres::cpu
