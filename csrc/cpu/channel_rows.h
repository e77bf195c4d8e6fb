// Channels_last images as a matrix (rows, channels), and the per-channel vectors beside it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "team.h"
#include "tensor_checks.h"

namespace fastres::cpu {

// Elements that one thread should have at least: fewer are done sooner than a thread is woken.
inline constexpr int64_t kGrainElements = 16384;

struct ChannelRows {
  DType dtype;
  int64_t channels;
  int64_t numel;
  int64_t period;      // channels, or the multiple of it that fills vectors
  int64_t tiled_rows;  // of `period` elements; the last one may be shorter

  ChannelRows(const Tensor& t, DType dtype)
      : dtype(dtype), channels(t.size(1)), numel(t.numel()), period(channels), tiled_rows(0) {
    if (numel == 0) return;
    constexpr int64_t shortest = 128, longest = 4096;
    const int64_t lanes = kernels().vector_bytes / scalar_bytes();
    const int64_t filling = lanes / std::gcd(channels, lanes);
    if (channels * filling <= longest) {
      const int64_t repeats = std::max<int64_t>(1, shortest / (channels * filling));
      period = channels * filling * repeats;
    }
    tiled_rows = (numel + period - 1) / period;
  }

  // Size of the computing type.
  int64_t scalar_bytes() const { return dtype == DType::float64 ? 8 : 4; }

  // Element range of tiled rows [begin, end).
  int64_t element(int64_t tiled_row) const { return std::min(tiled_row * period, numel); }

  // The values of a channel, one in each tile of (Count, period) sums, added up.
  template <size_t Count>
  std::array<std::vector<double>, Count> fold(const double* sums) const {
    std::array<std::vector<double>, Count> totals;
    for (size_t sum = 0; sum < Count; ++sum) {
      totals[sum].assign(channels, 0.0);
      for (int64_t i = 0; i < period; ++i) totals[sum][i % channels] += sums[sum * period + i];
    }
    return totals;
  }

  template <typename F>
  void parallel_for(const F& on_elements) const {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, period));
    cpu::parallel_for(0, tiled_rows, grain, [&](int64_t begin, int64_t end) {
      on_elements(element(begin), element(end));
    });
  }
};

// The values of a per-channel vector as double; `missing` for None.
inline std::vector<double> channel_values(const std::optional<Tensor>& t, int64_t channels,
                                          double missing) {
  if (!t.has_value()) return std::vector<double>(channels, missing);
  if (t->scalar_type() == ScalarType::Double) {
    const double* values = static_cast<const double*>(t->const_data_ptr());
    return std::vector<double>(values, values + channels);
  }
  const float* values = static_cast<const float*>(t->const_data_ptr());
  return std::vector<double>(values, values + channels);
}

inline Tensor to_channel_vector(const std::vector<double>& values, ScalarType type) {
  Tensor t = empty_vector(static_cast<int64_t>(values.size()), parameter_dtype(type));
  void* data = t.mutable_data_ptr();
  for (size_t c = 0; c < values.size(); ++c) {
    if (type == ScalarType::Double) {
      static_cast<double*>(data)[c] = values[c];
    } else {
      static_cast<float*>(data)[c] = static_cast<float>(values[c]);
    }
  }
  return t;
}

// A per-channel vector of the computing type, tiled to the period.
class TiledVector {
 public:
  TiledVector() = default;

  TiledVector(const ChannelRows& rows, const std::vector<double>& values)
      : data_(new char[rows.period * rows.scalar_bytes()]) {
    if (rows.dtype == DType::float64) {
      tile(reinterpret_cast<double*>(data_.get()), values, rows.period);
    } else {
      tile(reinterpret_cast<float*>(data_.get()), values, rows.period);
    }
  }

  const void* data() const { return data_.get(); }

 private:
  template <typename A>
  static void tile(A* out, const std::vector<double>& values, int64_t period) {
    const int64_t channels = static_cast<int64_t>(values.size());
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<A>(values[c]);
    for (int64_t i = channels; i < period; ++i) out[i] = out[i - channels];
  }

  std::unique_ptr<char[]> data_;
};

// One BatchNorm: x -> (x - mean) * scale + bias.
struct BatchNorm {
  std::vector<double> mean, inverse_deviation, scale, bias;

  // mean, var: (channels,); weight, bias: (channels,) or None for 1 and 0.
  BatchNorm(const Tensor& mean_, const Tensor& var, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias_, double eps)
      : mean(channel_values(mean_, mean_.numel(), 0.0)),
        inverse_deviation(channel_values(var, mean_.numel(), 0.0)),
        scale(channel_values(weight, mean_.numel(), 1.0)),
        bias(channel_values(bias_, mean_.numel(), 0.0)) {
    for (size_t c = 0; c < mean.size(); ++c) {
      inverse_deviation[c] = 1.0 / std::sqrt(inverse_deviation[c] + eps);
      scale[c] *= inverse_deviation[c];
    }
  }
};

// The BatchNorm of `input` that an op applies as it loads it, or none.
inline std::optional<BatchNorm> check_prologue(const char* op, const Tensor& input,
                                               const std::optional<Tensor>& in_mean,
                                               const std::optional<Tensor>& in_var,
                                               const std::optional<Tensor>& in_weight,
                                               const std::optional<Tensor>& in_bias,
                                               double in_eps) {
  if (in_mean.has_value() != in_var.has_value()) {
    fail(op, in_mean.has_value() ? "in_var" : "in_mean", " must be given where ",
         in_mean.has_value() ? "in_mean" : "in_var", " is, got None");
  }
  if (!in_mean.has_value()) {
    if (in_weight.has_value() || in_bias.has_value()) {
      fail(op, "in_mean must be given where in_weight or in_bias is, got None");
    }
    return std::nullopt;
  }
  const auto vector = [&](const char* name, const auto& t) {
    return check_channel_vector(op, name, t, input.size(1), input.scalar_type());
  };
  return BatchNorm(vector("in_mean", *in_mean), vector("in_var", *in_var),
                   vector("in_weight", in_weight), vector("in_bias", in_bias), in_eps);
}

// Gradients of a BatchNorm's vectors, from the sums over its rows of g and of g * (x - mean).
struct BatchNormGradients {
  std::vector<double> mean, var, weight, bias;

  BatchNormGradients() = default;

  BatchNormGradients(const BatchNorm& bn, const std::vector<double>& sum_g,
                     const std::vector<double>& sum_gx)
      : bias(sum_g) {
    const size_t channels = bn.mean.size();
    mean.resize(channels);
    var.resize(channels);
    weight.resize(channels);
    for (size_t c = 0; c < channels; ++c) {
      const double istd = bn.inverse_deviation[c];
      mean[c] = -bn.scale[c] * sum_g[c];
      var[c] = -0.5 * bn.scale[c] * istd * istd * sum_gx[c];
      weight[c] = istd * sum_gx[c];
    }
  }
};

}  // namespace fastres::cpu
