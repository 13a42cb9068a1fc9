#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

namespace linearard {

/// The pair form: row-wise divergence between the attention maps softmax(scale Q K^T) of a student and of a frozen
/// teacher, without an Nq x Nk tensor. Causal by default, aligned to the bottom right.
///
/// @param query_student [B, Hq, Nq, Ds], key_student [B, Hk, Nk, Ds], Hq a multiple of Hk (grouped queries)
/// @param query_teacher [B, Hq, Nq, Dt], key_teacher [B, Hkt, Nk, Dt], Hq a multiple of Hkt; no grad
/// @return as relation_kl, with [B, Hq, Nq] rows. Differentiable once, with respect to both student tensors.
///         A row that sees no key (fully masked) is 0.
at::Tensor attention_kl(const at::Tensor& query_student,
                        const at::Tensor& key_student,
                        const at::Tensor& query_teacher,
                        const at::Tensor& key_teacher,
                        const AttentionOptions& options = {});

/// The forward kernel: (kl, lse_student, lse_teacher), each [B, Hq, Nq], unweighted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_kl_forward(const at::Tensor& query_student,
                                                                    const at::Tensor& key_student,
                                                                    const at::Tensor& query_teacher,
                                                                    const at::Tensor& key_teacher,
                                                                    const AttentionOptions& options = {});

/// The backward kernel: (grad_query_student, grad_key_student).
std::tuple<at::Tensor, at::Tensor> attention_kl_backward(const at::Tensor& grad_kl,
                                                         const at::Tensor& query_student,
                                                         const at::Tensor& key_student,
                                                         const at::Tensor& query_teacher,
                                                         const at::Tensor& key_teacher,
                                                         const at::Tensor& lse_student,
                                                         const at::Tensor& lse_teacher,
                                                         const AttentionOptions& options = {});

}  // namespace linearard
