#include "rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <ATen/ATen.h>

namespace ard {
namespace {

// The dimension whose frequency turns `rotations` times within the original context.
double correction_dimension(const RopeParameters& rope, double rotations, double head_dim) {
  return head_dim * std::log(rope.original_context / (rotations * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
}

// YaRN: high frequencies stay, low ones are interpolated, between them a linear ramp.
at::Tensor yarn_frequencies(const RopeParameters& rope, const at::Tensor& native, int64_t head_dim) {
  const auto dimension = static_cast<double>(head_dim);
  const double low = std::max(std::floor(correction_dimension(rope, rope.beta_fast, dimension)), 0.0);
  double high = std::min(std::ceil(correction_dimension(rope, rope.beta_slow, dimension)), dimension - 1);
  if (low == high) high += 0.001;
  const at::Tensor index = at::arange(head_dim / 2, at::kFloat);
  const at::Tensor interpolated = ((index - low) / (high - low)).clamp(0, 1);
  return native / rope.factor * interpolated + native * (1 - interpolated);
}

}  // namespace

Rope::Rope(const RopeParameters& parameters, int64_t head_dim) {
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::kFloat) / static_cast<double>(head_dim);
  frequencies_ = 1.0 / at::pow(parameters.theta, exponents);
  if (parameters.type == "linear") frequencies_ = frequencies_ / parameters.factor;
  if (parameters.type == "yarn") {
    frequencies_ = yarn_frequencies(parameters, frequencies_, head_dim);
    attention_factor_ = parameters.attention_factor.value_or(0.1 * std::log(parameters.factor) + 1.0);
  }
}

Rotation Rope::rotation(int64_t tokens, at::Device device) const {
  const at::Tensor angles = at::outer(at::arange(tokens, at::kFloat), frequencies_).to(device);
  const at::Tensor both = at::cat({angles, angles}, -1);
  return {both.cos() * attention_factor_, both.sin() * attention_factor_};
}

at::Tensor rotate(const at::Tensor& x, const Rotation& rotation) {
  const std::vector<at::Tensor> halves = x.chunk(2, -1);
  return x * rotation.cosine + at::cat({-halves[1], halves[0]}, -1) * rotation.sine;
}

}  // namespace ard
