#include "conv_chain.h"

#include <algorithm>

#include "avg_pool_linear.h"
#include "conv_pool.h"
#include "max_pool2d.h"
#include "team.h"

namespace fastres::cpu {
namespace {

constexpr const char* kOp = "conv_chain";

// A unit's part of the program, field by field as in fastres/ops/conv_chain.py. Tensors are
// numbered from 0; -1 is none.
struct Unit {
  int64_t source, residual;
  int64_t weight, bias, running_mean, running_var, bn_weight, bn_bias, packed;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups, relu;
  // Of the max-pool after it; pool_h is 0 without one.
  int64_t pool_h, pool_w, pool_stride_h, pool_stride_w, pool_padding_h, pool_padding_w;
};

constexpr int64_t kFields = sizeof(Unit) / sizeof(int64_t);

int64_t elements(const std::array<int64_t, 4>& sizes) {
  return sizes[0] * sizes[1] * sizes[2] * sizes[3];
}

}  // namespace

ConvChain::ConvChain(const Tensor& input, const std::vector<Tensor>& tensors,
                     const std::vector<int64_t>& program, const std::vector<double>& eps,
                     const OptionalTensor& fc_weight, const OptionalTensor& fc_bias)
    : fc_weight_(fc_weight), fc_bias_(fc_bias) {
  const int64_t size = static_cast<int64_t>(program.size()), units = size / kFields;
  if (units == 0 || size % kFields != 0) {
    fail(kOp, "program must have ", kFields, " integers for each of one or more units, got ", size);
  }
  if (static_cast<int64_t>(eps.size()) != units) {
    fail(kOp, "eps must have one number for each of ", units, " units, got ", eps.size());
  }
  const auto* unit = reinterpret_cast<const Unit*>(program.data());
  for (int64_t i = 0; i < units; ++i) {
    const Unit& u = unit[i];
    const auto check_result = [&](const char* name, int64_t index, int64_t least) {
      if (index < least || index > i) {
        fail(kOp, name, " of unit ", i, " must be in [", least, ", ", i, "], got ", index);
      }
    };
    check_result("source", u.source, 0);
    check_result("residual", u.residual, -1);
    const auto check_tensor = [&](const char* name, int64_t index, int64_t least) {
      const int64_t count = static_cast<int64_t>(tensors.size());
      if (index < least || index >= count) {
        fail(kOp, name, " of unit ", i, " must be in [", least, ", ", count, "), got ", index);
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

  check_images(kOp, "input", input);
  dtype_ = check_dtype(kOp, "input", input);
  type_ = input.scalar_type();
  sizes_ = {{input.size(0), input.size(1), input.size(2), input.size(3)}};
  for (int64_t i = 0; i < units; ++i) {
    const Unit& u = unit[i];
    const auto given = [&](int64_t index) {
      return index < 0 ? OptionalTensor() : OptionalTensor(tensors[index]);
    };
    ConvUnit conv(input, sizes_[u.source], tensors[u.weight], given(u.bias),
                  tensors[u.running_mean], tensors[u.running_var], given(u.bn_weight),
                  given(u.bn_bias), eps[i], {u.stride_h, u.stride_w}, {u.padding_h, u.padding_w},
                  {u.dilation_h, u.dilation_w}, u.groups, u.relu != 0, given(u.packed));
    if (u.residual >= 0) conv.check_residual(sizes_[u.residual]);
    sizes_.push_back(conv.output());
    std::optional<PoolGeometry> pool;
    if (u.pool_h != 0) {
      pool = check_pool(kOp, sizes_.back(), {u.pool_h, u.pool_w},
                        {u.pool_stride_h, u.pool_stride_w}, {u.pool_padding_h, u.pool_padding_w});
      sizes_.back() = {pool->n, pool->c, pool->oh, pool->ow};
    }
    ours_ = ours_ && conv.algorithm() != Algorithm::aten;
    steps_.push_back({std::move(conv), u.source, u.residual, pool});
    steps_.back().folded = folded_floats_;
    folded_floats_ += steps_.back().unit.folded_floats();
    for (const int64_t used : {u.source, u.residual}) {
      if (used > 0) steps_[used - 1].last_use = i;
    }
  }
  assign_memory();
}

// All results, but the last where it is what is returned, each in the smallest memory that is free
// and large enough, else in the largest, enlarged.
void ConvChain::assign_memory() {
  std::vector<int64_t> free;
  const int64_t units = static_cast<int64_t>(steps_.size());
  for (int64_t i = 0; i < (fc_weight_.has_value() ? units : units - 1); ++i) {
    const int64_t wanted = elements(sizes_[i + 1]);
    const auto better = [&](int64_t a, int64_t b) {
      const int64_t of_a = memories_[a], of_b = memories_[b];
      const bool a_fits = of_a >= wanted, b_fits = of_b >= wanted;
      return a_fits != b_fits ? a_fits : a_fits ? of_a < of_b : of_a > of_b;
    };
    const auto best = std::min_element(free.begin(), free.end(), better);
    if (best == free.end()) {
      steps_[i].memory = static_cast<int64_t>(memories_.size());
      memories_.push_back(wanted);
    } else {
      steps_[i].memory = *best;
      memories_[*best] = std::max(memories_[*best], wanted);
      free.erase(best);
    }
    for (int64_t result = 0; result <= i; ++result) {
      if (std::max(steps_[result].last_use, result) == i) free.push_back(steps_[result].memory);
    }
  }
}

Tensor ConvChain::run(const Tensor& input) const {
  check_images(kOp, "input", input);
  const Sizes& sizes = sizes_[0];
  if (!std::equal(sizes.begin(), sizes.end(), input.sizes().begin()) ||
      input.scalar_type() != type_) {
    fail(kOp, "input must be of shape ", shape_string(sizes), " and ", dtype_string(type_),
         ", got ", shape_string(input), " and ", dtype_string(input.scalar_type()));
  }
  std::optional<AvgPoolLinear> head;
  if (fc_weight_.has_value()) {
    const AvgPoolLinear::Names names = {kOp, "fc_weight", "fc_bias"};
    head.emplace(names, input, sizes_.back()[1], *fc_weight_, fc_bias_);
  }
  const AvgPoolLinear* const given = head.has_value() ? &*head : nullptr;
  // In a team torch's own convolutions would have one thread.
  return ours_ ? run_ours(input, given) : run_any(input, given);
}

Tensor ConvChain::run_ours(const Tensor& input, const AvgPoolLinear* head) const {
  const Scratch folded = scratch_floats(folded_floats_);
  const Sizes& sizes = sizes_.back();
  const int64_t images = sizes[0];
  Tensor y = head != nullptr ? head->empty(images) : empty_channels_last(sizes, type_);
  const Tensor dense = with_dense_channels(input);
  std::vector<Scratch> memories;
  for (const int64_t numbers : memories_) {
    memories.emplace_back(static_cast<size_t>(numbers * element_bytes_of(dtype_)));
  }
  const Pixels first = pixels_of(dense);
  void* const last = y.mutable_data_ptr();
  // Of result 1 and so on, dense.
  const auto data_of = [&](int64_t result) -> void* {
    const int64_t memory = steps_[result - 1].memory;
    return memory < 0 ? last : memories[memory].floats();
  };
  const auto pixels_of_result = [&](int64_t result) -> Pixels {
    if (result == 0) return first;
    const auto [n, c, h, w] = sizes_[result];
    return {data_of(result), h * w * c, w * c, c};
  };
  const bool adds_input = std::any_of(steps_.begin(), steps_.end(),
                                      [](const Step& step) { return step.residual == 0; });
  const Tensor residual_input = adds_input ? as_channels_last(dense) : dense;
  const int64_t count = static_cast<int64_t>(steps_.size());
  with_team([&] {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) steps_[i].unit.fold(folded.floats() + steps_[i].folded);
    });
    if (images == 0) return;
    for (int64_t i = 0; i < count; ++i) {
      const Step& step = steps_[i];
      const void* residual = nullptr;
      if (step.residual >= 0) {
        residual = step.residual == 0 ? residual_input.const_data_ptr() : data_of(step.residual);
      }
      step.unit.run(pixels_of_result(step.source), residual, folded.floats() + step.folded,
                    pool_of(step), data_of(i + 1));
    }
    if (head != nullptr) head->run(data_of(count), images, sizes[2] * sizes[3], last);
  });
  return y;
}

Tensor ConvChain::run_any(const Tensor& input, const AvgPoolLinear* head) const {
  std::vector<OptionalTensor> results = {input};
  for (int64_t i = 0; i < static_cast<int64_t>(steps_.size()); ++i) {
    const Step& step = steps_[i];
    const OptionalTensor residual = step.residual < 0 ? OptionalTensor() : results[step.residual];
    results.push_back(step.unit.run(*results[step.source], residual, pool_of(step)));
    for (const int64_t used : {step.source, step.residual}) {
      if (used > 0 && steps_[used - 1].last_use == i) results[used].reset();
    }
  }
  if (head == nullptr) return *results.back();
  const Sizes& sizes = sizes_.back();
  Tensor y = head->empty(sizes[0]);
  head->run(as_channels_last(*results.back()).const_data_ptr(), sizes[0], sizes[2] * sizes[3],
            y.mutable_data_ptr());
  return y;
}

Tensor conv_chain(const Tensor& input, const std::vector<Tensor>& tensors,
                  const std::vector<int64_t>& program, const std::vector<double>& eps,
                  const OptionalTensor& fc_weight, const OptionalTensor& fc_bias) {
  return ConvChain(input, tensors, program, eps, fc_weight, fc_bias).run(input);
}

}  // namespace fastres::cpu
