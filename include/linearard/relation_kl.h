#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

namespace linearard {

/// Divergence between the self-relations softmax(scale X X^T) of a student and of a frozen teacher, row by row,
/// without an N x N tensor. Formulas: docs/mathematics.md; source: LinearARD, arXiv 2604.00004.
///
/// @param student [B, H, N, Ds] float32, float64, bfloat16 or float16; contiguous last dimension; 1 <= Ds <= 512
/// @param teacher [B, H, N, Dt], any of these dtypes, same device; must not require grad
/// @return float32 (float64 if either input is float64), nats: [B, H, N] for Reduction::kNone (each row times its
///         row_weight; 0 for padding), else a scalar. Differentiable once, with respect to the student.
/// @throws c10::Error naming the operator, the argument, what was expected and what came
at::Tensor relation_kl(const at::Tensor& student, const at::Tensor& teacher, const RelationOptions& options = {});

/// The forward kernel: (kl, lse_student, lse_teacher), each [B, H, N], unweighted; rows of padding are 0.
/// `row_weight`, `reduction` and `num_items` of the options do not apply.
std::tuple<at::Tensor, at::Tensor, at::Tensor> relation_kl_forward(const at::Tensor& student,
                                                                   const at::Tensor& teacher,
                                                                   const RelationOptions& options = {});

/// The backward kernel: the gradient of sum(grad_kl * kl) with respect to the student, in its shape and dtype.
/// @param grad_kl [B, H, N]; lse_student, lse_teacher [B, H, N] as relation_kl_forward returned them
at::Tensor relation_kl_backward(const at::Tensor& grad_kl,
                                const at::Tensor& student,
                                const at::Tensor& teacher,
                                const at::Tensor& lse_student,
                                const at::Tensor& lse_teacher,
                                const RelationOptions& options = {});

/// lse_i = log sum_j exp(scale x_i . x_j), [B, H, N], nats: the statistics of one side, for cached teachers.
/// Of the options, key_padding_mask, cu_seqlens, scale_teacher (the scale), causal and deterministic apply.
at::Tensor relation_lse(const at::Tensor& x, const RelationOptions& options = {});

}  // namespace linearard
