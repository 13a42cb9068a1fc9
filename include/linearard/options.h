#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

namespace linearard {

/// Divergence between a teacher row P and a student row Q, in nats.
enum class Divergence {
  kForwardKL,  ///< KL(P || Q), the method's; "forward_kl"
  kReverseKL,  ///< KL(Q || P); "reverse_kl"
  kJSD,        ///< beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q; "jsd"
};

/// What becomes of the [B, H, N] values of the rows.
enum class Reduction {
  kNone,  ///< returned as they are; "none"
  kSum,   ///< their sum; "sum"
  kMean,  ///< their sum / (H x number of real tokens); "mean"
};

/// Parse the names that the operators take; an unknown name is a c10::Error that lists the valid ones.
Divergence parse_divergence(std::string_view name, std::string_view operator_name);
Reduction parse_reduction(std::string_view name, std::string_view operator_name);
std::string_view to_string(Divergence divergence);
std::string_view to_string(Reduction reduction);

/// Options of relation_kl. Unset optionals mean: no mask, one sequence per batch entry, unit weights, scale D^-0.5.
struct RelationOptions {
  /// [B, N] bool, true = a real token. Padding takes part neither as row nor as key and is never read.
  TORCH_ARG(std::optional<at::Tensor>, key_padding_mask);
  /// [S + 1] int32 or int64, strictly increasing from 0 to N; needs B = 1. Relations stay inside a sequence.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens);
  /// [B, N] floating point: multiplies the divergence of each token's rows.
  TORCH_ARG(std::optional<at::Tensor>, row_weight);
  /// Factor on the student's inner products; default Ds^-0.5.
  TORCH_ARG(std::optional<double>, scale_student);
  /// Factor on the teacher's inner products; default Dt^-0.5.
  TORCH_ARG(std::optional<double>, scale_teacher);
  /// Row i sees keys j <= i only (of its sequence).
  TORCH_ARG(bool, causal) = false;
  TORCH_ARG(Divergence, divergence) = Divergence::kForwardKL;
  /// Weight of the teacher in the mixture of the Jensen-Shannon divergence, inside (0, 1).
  TORCH_ARG(double, beta) = 0.5;
  TORCH_ARG(Reduction, reduction) = Reduction::kMean;
  /// Scalar tensor that replaces the token count of the mean (gradient accumulation).
  TORCH_ARG(std::optional<at::Tensor>, num_items);
  /// Bitwise equal results from run to run; unset follows torch.use_deterministic_algorithms.
  TORCH_ARG(std::optional<bool>, deterministic);
  /// [B, H, N] float32 (float64 for a float64 teacher): statistics of the teacher from relation_lse, which the backward
  /// takes in place of those that the forward computes along with the divergence.
  TORCH_ARG(std::optional<at::Tensor>, lse_teacher);
};

/// Options of attention_kl. Rows are queries; unset optionals mean what they mean in RelationOptions.
struct AttentionOptions {
  /// [B, Nq] bool, true = a real query. Unset and Nq = Nk: the same as key_padding_mask.
  TORCH_ARG(std::optional<at::Tensor>, query_padding_mask);
  /// [B, Nk] bool, true = a real key.
  TORCH_ARG(std::optional<at::Tensor>, key_padding_mask);
  /// [S + 1] boundaries of packed queries; needs B = 1.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens);
  /// [S + 1] boundaries of packed keys; unset: the same as cu_seqlens.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens_key);
  /// [B, Nq] floating point.
  TORCH_ARG(std::optional<at::Tensor>, row_weight);
  TORCH_ARG(std::optional<double>, scale_student);
  TORCH_ARG(std::optional<double>, scale_teacher);
  /// Query i of a sequence sees keys j <= i + (Nk - Nq): aligned to the bottom right.
  TORCH_ARG(bool, causal) = true;
  TORCH_ARG(Divergence, divergence) = Divergence::kForwardKL;
  TORCH_ARG(double, beta) = 0.5;
  TORCH_ARG(Reduction, reduction) = Reduction::kMean;
  TORCH_ARG(std::optional<at::Tensor>, num_items);
  TORCH_ARG(std::optional<bool>, deterministic);
};

}  // namespace linearard
