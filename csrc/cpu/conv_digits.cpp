#include "conv_digits.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "conv_amx.h"
#include "conv_blocks.h"
#include "team.h"

namespace fastres::cpu {
namespace {

// How many digits the weights have, in a line by itself.
constexpr int64_t kHeader = 16;
// Digits of a step of a panel, as floats: four in all cases.
constexpr int64_t kStepFloats = 4 * kDigitDepth * kConvPanel / 4;

int64_t steps_of(const ConvShape& s) { return amx_steps(s.ci, kPixelDigits); }

// In packed weights, one after the other.
struct Layout {
  int64_t input_scale, output_scale, data, size;

  explicit Layout(const ConvShape& s) {
    input_scale = kHeader;
    output_scale = input_scale + steps_of(s) * kDigitDepth;
    data = output_scale + s.panels() * kConvPanel;
    const int64_t digits = s.panels() * s.kh * s.kw * steps_of(s) * kStepFloats;
    size = data + std::max(digits, amx_packed_floats(s, DType::float32));
  }
};

// The integer next to x, as a double.
double rounded(double x) {
  constexpr double shift = 0x1.8p52;  // where a double's last bit is 1
  return x + shift - shift;
}

// A panel's weights divided by the input channels' scales, [output channel][tap][input channel],
// padded with zeros to whole steps.
class PanelWeights {
 public:
  PanelWeights(const ConvWeight& w, const ConvShape& s, const float* input_scale)
      : w_(w),
        input_scale_(input_scale),
        taps_(s.kh * s.kw),
        channels_(steps_of(s) * kDigitDepth),
        numbers_(kConvPanel * taps_ * channels_) {}

  void load(int64_t panel) {
    const int64_t count = std::min<int64_t>(kConvPanel, w_.co - panel * kConvPanel);
    for (int64_t o = 0; o < count; ++o) {
      const float* const from = w_.data + (panel * kConvPanel + o) * w_.stride_o;
      float* const to = numbers_.data() + o * taps_ * channels_;
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const float* in = from + tap / w_.kw * w_.stride_h + tap % w_.kw * w_.stride_w;
        for (int64_t i = 0; i < w_.ci; ++i, in += w_.stride_i) {
          to[tap * channels_ + i] = *in / input_scale_[i];
        }
      }
    }
    std::fill(numbers_.begin() + count * taps_ * channels_, numbers_.end(), 0.0f);
  }

  const float* channel(int64_t o) const { return numbers_.data() + o * taps_ * channels_; }

  // What the sums of products of an output channel's digits are to be multiplied by: they count in
  // units of the highest places, 2^24 and 2^(8 (digits - 1)). The same for all numbers of digits.
  float scale(int64_t o) const {
    const float* const x = channel(o);
    float largest = 0.0f;
    for (int64_t i = 0; i < taps_ * channels_; ++i) largest = std::max(largest, std::abs(x[i]));
    if (largest == 0.0f) return 1.0f;
    const float scale = static_cast<float>(static_cast<double>(largest) * 0x1p24 / 127.0);
    return std::nextafter(scale, std::numeric_limits<float>::infinity());
  }

  // An integer's value in an output channel of such a scale.
  static double unit(float scale, int digits) {
    return static_cast<double>(scale) * std::exp2(-24 - 8 * (digits - 1));
  }

  // Whether rounding is a small error of an output channel, whose numbers are finite.
  bool fits(int64_t o, float scale, int digits) const {
    if (!std::isfinite(scale) || scale < std::numeric_limits<float>::min()) return false;
    const double unit_of = unit(scale, digits), inverse = 1.0 / unit_of;
    const float* const x = channel(o);
    double norm = 0.0, error = 0.0;
    for (int64_t i = 0; i < taps_ * channels_; ++i) {
      const double number = x[i], rest = number - rounded(number * inverse) * unit_of;
      norm += number * number;
      error += rest * rest;
    }
    return error <= 0x1p-44 * norm && std::isfinite(norm);
  }

  // The digits, [step][tap][digit][16 quadruples of input channels][16 output channels][4], the
  // highest digit first.
  void store(const float* scale, int digits, int8_t* to) const {
    // A digit that is negative borrows from the next.
    const uint32_t bias = digits == 4 ? 0x00808080 : 0x00008080;
    for (int64_t o = 0; o < kConvPanel; ++o) {
      const double inverse = 1.0 / unit(scale[o], digits);
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const float* x = channel(o) + tap * channels_;
        for (int64_t i = 0; i < channels_; i += 4, x += 4) {
          const int64_t step = i / kDigitDepth * taps_ + tap;
          int8_t* const at = to + (step * digits * kDigitDepth + i % kDigitDepth) * kConvPanel;
          uint32_t biased[4];
          for (int c = 0; c < 4; ++c) {
            const auto number = static_cast<int32_t>(rounded(x[c] * inverse));
            biased[c] = (static_cast<uint32_t>(number) + bias) ^ bias;
          }
          for (int d = 0; d < digits; ++d) {
            const int place = 8 * (digits - 1 - d);
            int8_t four[4];
            for (int c = 0; c < 4; ++c) four[c] = static_cast<int8_t>(biased[c] >> place);
            std::memcpy(at + d * kDigitDepth * kConvPanel + o * 4, four, 4);
          }
        }
      }
    }
  }

 private:
  const ConvWeight& w_;
  const float* input_scale_;
  int64_t taps_, channels_;
  std::vector<float> numbers_;
};

// What input channels are multiplied by: powers of two that let the weights of weak ones be larger.
void choose_input_scales(const ConvWeight& w, int64_t padded, float* scale) {
  constexpr int kept = 2, most = 60;  // a quarter as large is not weak
  std::vector<float> largest(w.ci, 0.0f);
  parallel_for(0, w.ci, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = 0; o < w.co; ++o) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const in = w.data + o * w.stride_o + i * w.stride_i;
        for (int64_t h = 0; h < w.kh; ++h) {
          for (int64_t v = 0; v < w.kw; ++v) {
            largest[i] = std::max(largest[i], std::abs(in[h * w.stride_h + v * w.stride_w]));
          }
        }
      }
    }
  });
  std::vector<int> exponents(w.ci);
  for (int64_t i = 0; i < w.ci; ++i) {
    exponents[i] =
        largest[i] > 0.0f && std::isfinite(largest[i]) ? std::ilogb(largest[i]) : INT_MIN;
  }
  const int highest = *std::max_element(exponents.begin(), exponents.end());
  for (int64_t i = 0; i < padded; ++i) {
    const bool weak = i < w.ci && exponents[i] != INT_MIN && exponents[i] < highest - kept;
    scale[i] = weak ? std::ldexp(1.0f, -std::min(highest - kept - exponents[i], most)) : 1.0f;
  }
}

AmxConvArgs args_of(const ConvArgs& conv, const ConvShape& s) {
  const Layout layout(s);
  const float* const packed = conv.weight;
  AmxConvArgs args = dense_args(conv, s);
  args.conv.weight = packed + layout.data;
  args.weights = {.digits = static_cast<int>(packed[0]),
                  .input_scale = packed + layout.input_scale,
                  .output_scale = packed + layout.output_scale,
                  .data = reinterpret_cast<const int8_t*>(packed + layout.data)};
  return args;
}

}  // namespace

bool digits_take(const ConvShape& s) {
  // Sums of four products of digits fit 32 bits; short sums do not repay joining them.
  constexpr int64_t fewest_channels = 32, longest_sum = 16384;
  return has_matrix_unit() && s.kh * s.kw > 1 && s.ci >= fewest_channels &&
         s.ci * s.kh * s.kw <= longest_sum && s.groups == 1 && s.dilation[0] == 1 &&
         s.dilation[1] == 1;
}

int64_t digits_packed_floats(const ConvShape& s) { return Layout(s).size; }

void digits_pack(const ConvWeight& weight, const ConvShape& s, float* packed) {
  const Layout layout(s);
  float* const scale = packed + layout.output_scale;
  std::fill_n(packed, layout.size, 0.0f);
  choose_input_scales(weight, layout.output_scale - layout.input_scale,
                      packed + layout.input_scale);
  std::fill_n(scale, s.panels() * kConvPanel, 1.0f);
  std::atomic<bool> three = true, four = true;
  const auto each_panel = [&](const auto& f) {
    parallel_for(0, s.panels(), 1, [&](int64_t begin, int64_t end) {
      PanelWeights panel_weights(weight, s, packed + layout.input_scale);
      for (int64_t panel = begin; panel < end; ++panel) {
        panel_weights.load(panel);
        f(panel_weights, panel);
      }
    });
  };
  each_panel([&](const PanelWeights& weights, int64_t panel) {
    for (int64_t o = 0; o < kConvPanel; ++o) {
      float& of = scale[panel * kConvPanel + o];
      of = weights.scale(o);
      if (weights.fits(o, of, 3)) continue;
      three = false;
      if (!weights.fits(o, of, 4)) four = false;
    }
  });
  const int digits = three ? 3 : four ? 4 : 0;
  packed[0] = static_cast<float>(digits);
  if (digits == 0) {
    pack_panels(weight, kernels().amx_pack[static_cast<int>(DType::float32)], packed + layout.data);
    return;
  }
  const int64_t panel_bytes = s.kh * s.kw * steps_of(s) * digits * kDigitDepth * kConvPanel;
  each_panel([&](const PanelWeights& weights, int64_t panel) {
    weights.store(scale + panel * kConvPanel, digits,
                  reinterpret_cast<int8_t*>(packed + layout.data) + panel * panel_bytes);
  });
}

bool run_digits(const ConvArgs& args, const ConvShape& s) {
  return run_amx(args_of(args, s), s, DType::float32, false).has_value();
}

}  // namespace fastres::cpu
