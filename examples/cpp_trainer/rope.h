#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "model_config.h"

namespace ard {

/// Cosines and sines [N, D], float32, that rotate the head dimensions i and i + D/2 of token n by n times a frequency.
struct Rotation {
  at::Tensor cosine;
  at::Tensor sine;
};

/// Rotary position embedding (Su et al., arXiv 2104.09864), with position interpolation (Chen et al., arXiv 2306.15595)
/// or YaRN (Peng et al., arXiv 2309.00071), as transformers computes them.
class Rope {
 public:
  Rope(const RopeParameters& parameters, int64_t head_dim);

  Rotation rotation(int64_t tokens, at::Device device) const;

  /// What cosines and sines are multiplied by, and queries and keys with them: 1 but for YaRN.
  double attention_factor() const { return attention_factor_; }

 private:
  at::Tensor frequencies_;  // [D/2] float32
  double attention_factor_ = 1.0;
};

/// x [B, H, N, D] rotated, in the dtype that x and float32 promote to.
at::Tensor rotate(const at::Tensor& x, const Rotation& rotation);

}  // namespace ard
