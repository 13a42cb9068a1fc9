#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

namespace linearard {

/// Weights and reduces the rows' values kl [B, H, N], in differentiable ATen operators.
/// @param row_mask [B, N] bool, true = a row that counts; @param row_weight [B, N]
at::Tensor reduce_rows(const at::Tensor& kl,
                       const std::optional<at::Tensor>& row_mask,
                       const std::optional<at::Tensor>& row_weight,
                       Reduction reduction,
                       const std::optional<at::Tensor>& num_items);

/// The same of several relations that share B, N and what they are weighted with, [R]: float64 if any is.
/// @param reduction a sum or a mean
at::Tensor reduce_relations(at::TensorList kl,
                            const std::optional<at::Tensor>& row_mask,
                            const std::optional<at::Tensor>& row_weight,
                            Reduction reduction,
                            const std::optional<at::Tensor>& num_items);

}  // namespace linearard
