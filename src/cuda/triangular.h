#pragma once

#include <optional>
#include <vector>

#include "cuda/problem.h"

// The host side of cuda/triangular: self-relations of one 16-bit type and the forward KL, dense or causal, with padding
// but not packed. Relations of a call that differ in nothing but heads and strides share their launches.

namespace linearard::cuda {

/// Whether calls may run on the kernels of sm_90a.
bool hopper_is_enabled();

/// What a triangular forward leaves to the dense kernels: rows that need another computation, as ForwardParams takes
/// them.
struct ListedRows {
  at::Tensor memory;
  const int* counts;
  const int* lists;
  RedoMarks redo;  ///< all clear
};

/// A problem and where its rows are written.
struct TriangularRows {
  const Problem* problem;
  RowTensors to;
};

/// Writes the rows of each problem. Nothing for those that the triangular kernels do not take; they are left as they
/// are. Problems that see the same rows have the same memory of visibility.
std::vector<std::optional<ListedRows>> triangular_forward(const std::vector<TriangularRows>& relations);

/// Heads whose gradient is left to the dense kernels, as BackwardParams takes them.
struct LeftHeads {
  at::Tensor memory;
  const int* heads;
};

struct TriangularGradient {
  const Problem* problem;
  at::Tensor grad_kl;         ///< [B, H, N] float, contiguous or expanded from one number
  float* row_grads;           ///< [B, H, N] where grad_kl is written out for the dense kernels; null: not wanted
  at::Tensor lse_student;     ///< likewise
  at::Tensor lse_teacher;     ///< likewise
  const float* largest_grad;  ///< null but for half
  double output_scale;
  at::Tensor gradient;  ///< [B, H, N, D] of the student's type, contiguous: written
  RedoMarks redo;       ///< cleared
};

/// Whether all elements are one number in memory.
bool is_expanded_scalar(const at::Tensor& tensor);

/// Writes the gradient of each problem; likewise.
std::vector<std::optional<LeftHeads>> triangular_backward(const std::vector<TriangularGradient>& relations);

/// Upper bounds on the memory of both, for the plan; 0 where the kernels do not take the problem.
struct TriangularWorkspace {
  int64_t forward;
  int64_t backward;
  bool on_hopper;  ///< whether the forward runs on the kernels of sm_90a
};
TriangularWorkspace triangular_workspace(const Problem& problem);

}  // namespace linearard::cuda
