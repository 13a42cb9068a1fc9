#pragma once

#include <tuple>

#include <ATen/core/Tensor.h>
#include <linearard/options.h>

namespace linearard::testing {

/// Plain N x N computation in float64 with ATen operators; differentiable, so autograd gives the reference gradients.
/// The Python tests hold the full reference; this one serves the options that the C++ tests use.
/// @return (divergence, lse_student, lse_teacher) of every row, [B, H, N] float64
std::tuple<at::Tensor, at::Tensor, at::Tensor> reference_rows(const at::Tensor& student_logits,
                                                              const at::Tensor& teacher_logits,
                                                              const at::Tensor& visible,
                                                              Divergence divergence,
                                                              double beta);

/// Rows of relation_kl for the mask, scales, causal, divergence and beta of `options`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> reference_relation(const at::Tensor& student,
                                                                  const at::Tensor& teacher,
                                                                  const RelationOptions& options = {});

/// Rows of attention_kl for the scales, causal, divergence and beta of `options`; grouped queries supported.
std::tuple<at::Tensor, at::Tensor, at::Tensor> reference_attention(const at::Tensor& query_student,
                                                                   const at::Tensor& key_student,
                                                                   const at::Tensor& query_teacher,
                                                                   const at::Tensor& key_teacher,
                                                                   const AttentionOptions& options = {});

/// Unit Gaussian [batch, heads, tokens, dimension] in float64, the same for the same seed.
at::Tensor gaussian(int64_t batch, int64_t heads, int64_t tokens, int64_t dimension, uint64_t seed);

/// Student at distance 0.2 from the teacher, and the teacher, in `dtype`.
std::tuple<at::Tensor, at::Tensor> student_and_teacher(
    int64_t batch, int64_t heads, int64_t tokens, int64_t dimension, at::ScalarType dtype = at::kFloat);

/// Largest excess of |value - exact| over 1e-4 |exact| + 1e-7: what the library promises for rows from 1e-3 nats, and
/// the absolute bound below; at most 0 when every row keeps it.
double row_excess(const at::Tensor& value, const at::Tensor& exact);

/// Error of a gradient in the Frobenius norm, relative to the exact one.
double relative_error(const at::Tensor& value, const at::Tensor& exact);

/// The library's promise for relative_error, by the dtype of the gradient.
double gradient_promise(at::ScalarType dtype);

}  // namespace linearard::testing
