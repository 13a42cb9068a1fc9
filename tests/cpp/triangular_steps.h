#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include <triangular/params.h>

#include "kernel_parameters.h"

// A call on self-relations step by step, on the CPU by tests/emulation: the triangular kernels with the steps before
// and after them. Several relations are one group, served by the same launches.

namespace linearard::testing {

/// Those of cuda/triangular, or of cuda/sm90.
enum class Kernels { kPortable, kHopper };

template <typename Params>
Params triangular_params(const std::vector<KernelProblem>& relations, cuda::Traversal traversal) {
  constexpr double kUnit = 1.4426950408889634;
  const KernelProblem& first = relations[0];
  Params params{};
  std::vector<int> heads;
  for (size_t r = 0; r < relations.size(); ++r) {
    params.vectors.student[r] = vectors_of(relations[r].student_rows, relations[r].heads());
    params.vectors.teacher[r] = vectors_of(relations[r].teacher_rows, relations[r].heads());
    heads.push_back(static_cast<int>(relations[r].heads()));
  }
  params.student = params.vectors.student[0];
  params.teacher = params.vectors.teacher[0];
  params.batch = static_cast<int>(first.batch());
  params.heads = heads[0];
  params.tokens = static_cast<int>(first.rows());
  params.causal = first.causal;
  params.traversal = traversal;
  params.mask = first.memory.visibility.row_mask;
  params.factors = {static_cast<float>(first.scale_teacher() * kUnit),
                    static_cast<float>(first.scale_student() * kUnit),
                    static_cast<float>(1 - first.scale_teacher() / first.scale_student())};
  params.group = cuda::RelationGroup::of(params.batch, heads.data(), static_cast<int>(heads.size()));
  return params;
}

/// The rows of a forward, and how many of them were left to the dense kernels.
struct Rows {
  ForwardResult result;
  int64_t listed;
};

/// All three steps; the listed rows are computed by the dense kernels where they exist for the type and dimension.
std::vector<Rows> run_forward(const std::vector<KernelProblem>& relations,
                              cuda::Traversal traversal,
                              Kernels kernels = Kernels::kPortable);
inline Rows run_forward(const KernelProblem& problem, cuda::Traversal traversal) {
  return run_forward(std::vector<KernelProblem>{problem}, traversal)[0];
}

struct Gradient {
  at::Tensor gradient;
  at::Tensor wide_heads;
};

/// @param grad_kl [B, H, N] of each relation, which may be expanded from one number
std::vector<Gradient> run_backward(const std::vector<KernelProblem>& relations,
                                   cuda::Traversal traversal,
                                   const std::vector<at::Tensor>& grad_kl,
                                   const std::vector<ForwardResult>& rows,
                                   Kernels kernels = Kernels::kPortable);
inline Gradient run_backward(const KernelProblem& problem,
                             cuda::Traversal traversal,
                             const at::Tensor& grad_kl,
                             const ForwardResult& rows) {
  return run_backward({problem}, traversal, {grad_kl}, std::vector<ForwardResult>{rows})[0];
}

}  // namespace linearard::testing
