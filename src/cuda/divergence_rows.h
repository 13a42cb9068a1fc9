#pragma once

#include <ATen/core/Tensor.h>

#include "aten/divergence.h"

// The bridge from tensors to the row-wise CUDA kernels: the forward KL of float logits in one kernel instead of thirty.

namespace linearard::aten {

/// Whether the kernels take these logits: contiguous float on a CUDA device.
bool fused_rows_available(const at::Tensor& teacher, const at::Tensor& delta);

/// @param teacher, delta [G, rows, keys]; an invisible key has t = -infinity and delta = 0
RowValues fused_forward_kl(const at::Tensor& teacher, const at::Tensor& delta);

/// weight (Q - P), written over `teacher` and returned. @param lse_teacher, lse_difference, weight [G, rows]
/// @param diagonal column of the first row's own key, which gets minus the sum of the others; -1: none
at::Tensor fused_forward_kl_gradient(const at::Tensor& teacher,
                                     const at::Tensor& delta,
                                     const at::Tensor& lse_teacher,
                                     const at::Tensor& lse_difference,
                                     const at::Tensor& weight,
                                     int64_t diagonal);

}  // namespace linearard::aten
