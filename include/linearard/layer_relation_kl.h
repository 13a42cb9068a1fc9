#pragma once

#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

namespace linearard {

/// relation_kl of several relations in one call: queries, keys and values of one layer or of several. On a GPU
/// relations of the same dtype and head dimension share their kernels, which counts where one relation does not fill
/// the device.
///
/// @param students R tensors [B, H_r, N, Ds_r] as relation_kl takes them; B, N and the device are the same for all,
/// heads,
///        head dimensions and dtypes may differ
/// @param teachers R tensors [B, H_r, N, Dt_r]; must not require grad
/// @param options of all relations; `reduction` is Reduction::kSum or Reduction::kMean, `lse_teacher` does not apply
/// @return [R] float32 (float64 if any input is float64), nats: what relation_kl returns for each pair. Differentiable
///         once, with respect to the students.
/// @throws c10::Error naming the operator, the argument, what was expected and what came
at::Tensor layer_relation_kl(at::TensorList students, at::TensorList teachers, const RelationOptions& options = {});

/// Its rows: (kl, lse_student, lse_teacher), of each R tensors [B, H_r, N], as relation_kl_forward returns them. kl is
/// differentiable once, with respect to the students.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>> layer_relation_kl_forward(
    at::TensorList students, at::TensorList teachers, const RelationOptions& options = {});

/// The backward kernels: the gradients of sum_r sum(grad_kl[r] * kl[r]) with respect to the students, in their shapes
/// and dtypes.
/// @param grad_kl R tensors [B, H_r, N]; lse_student, lse_teacher as layer_relation_kl_forward returned them
std::vector<at::Tensor> layer_relation_kl_backward(at::TensorList grad_kl,
                                                   at::TensorList students,
                                                   at::TensorList teachers,
                                                   at::TensorList lse_student,
                                                   at::TensorList lse_teacher,
                                                   const RelationOptions& options = {});

}  // namespace linearard
