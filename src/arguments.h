#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

namespace linearard {

/// Arguments of the relation kernels after the checks, with the defaults filled in.
struct RelationArguments {
  at::Tensor student;                          ///< [B, H, N, Ds]
  at::Tensor teacher;                          ///< [B, H, N, Dt]
  std::optional<at::Tensor> key_padding_mask;  ///< [B, N] bool
  std::optional<at::Tensor> cu_seqlens;        ///< [S + 1]
  double scale_student = 1;
  double scale_teacher = 1;
  bool causal = false;
  Divergence divergence = Divergence::kForwardKL;
  double beta = 0.5;
  bool deterministic = false;
};

/// Arguments of the attention kernels after the checks, with the defaults filled in.
struct AttentionArguments {
  at::Tensor query_student;                      ///< [B, Hq, Nq, Ds]
  at::Tensor key_student;                        ///< [B, Hk, Nk, Ds]
  at::Tensor query_teacher;                      ///< [B, Hq, Nq, Dt]
  at::Tensor key_teacher;                        ///< [B, Hkt, Nk, Dt]
  std::optional<at::Tensor> query_padding_mask;  ///< [B, Nq] bool
  std::optional<at::Tensor> key_padding_mask;    ///< [B, Nk] bool
  std::optional<at::Tensor> cu_seqlens;          ///< [S + 1], queries
  std::optional<at::Tensor> cu_seqlens_key;      ///< [S + 1], keys
  double scale_student = 1;
  double scale_teacher = 1;
  bool causal = true;
  Divergence divergence = Divergence::kForwardKL;
  double beta = 0.5;
  bool deterministic = false;
};

/// Divergences and log-sum-exps are float64 where an input is, else float32.
template <typename... Tensors>
at::ScalarType statistics_dtype_of(const Tensors&... inputs) {
  return ((inputs.scalar_type() == at::kDouble) || ...) ? at::kDouble : at::kFloat;
}

inline at::ScalarType statistics_dtype(const RelationArguments& arguments) {
  return statistics_dtype_of(arguments.student, arguments.teacher);
}

inline at::ScalarType statistics_dtype(const AttentionArguments& arguments) {
  return statistics_dtype_of(arguments.query_student, arguments.key_student, arguments.query_teacher,
                             arguments.key_teacher);
}

}  // namespace linearard
