#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include <launch.h>

// Parameters of the CUDA kernels out of tensors on the CPU, for kernels that the tests emulate.

namespace linearard::testing {

/// @param heads of the rows; `tensor` [B, heads or fewer, N, D] may be shared by groups of them
cuda::Vectors vectors_of(const at::Tensor& tensor, int64_t heads);

/// Which rows see which keys, and the memory behind it.
struct EmulatedVisibility {
  cuda::Visibility visibility{};
  at::Tensor row_mask;
  at::Tensor key_mask;
  at::Tensor prefix;
  at::Tensor ranges;
};

/// Boundaries of packed sequences, [S + 1] int64 each.
struct Boundaries {
  at::Tensor rows;
  at::Tensor keys;
};

/// @param mask [B, N] bool, of rows and keys of a self-relation; runs the kernel that makes ranges of it and of the
///        boundaries
EmulatedVisibility visibility_of(int64_t batch,
                                 int64_t rows,
                                 int64_t keys,
                                 bool causal,
                                 const std::optional<at::Tensor>& mask,
                                 const Boundaries& boundaries = {});

/// Zeros for marks of rows that float cannot hold.
at::Tensor clear_marks(int64_t heads, int64_t rows);

/// Both forms of a call on tensors [B, H, N, D]; a self-relation has the same rows and keys.
struct KernelProblem {
  at::Tensor student_rows;
  at::Tensor student_keys;
  at::Tensor teacher_rows;
  at::Tensor teacher_keys;
  bool relation = true;
  bool causal = false;
  std::optional<at::Tensor> mask;
  EmulatedVisibility memory{};

  int64_t batch() const { return student_rows.size(0); }
  int64_t heads() const { return student_rows.size(1); }
  int64_t rows() const { return student_rows.size(2); }
  int64_t keys() const { return student_keys.size(2); }
  double scale_student() const;
  double scale_teacher() const;
};

KernelProblem relation_problem(const at::Tensor& student,
                               const at::Tensor& teacher,
                               bool causal = false,
                               const std::optional<at::Tensor>& mask = {});
KernelProblem attention_problem(const at::Tensor& query_student,
                                const at::Tensor& key_student,
                                const at::Tensor& query_teacher,
                                const at::Tensor& key_teacher,
                                bool causal = false,
                                const Boundaries& boundaries = {});

/// Results [B, H, rows] float of a forward kernel, and the marks.
struct ForwardResult {
  at::Tensor kl;
  at::Tensor lse_student;
  at::Tensor lse_teacher;
  at::Tensor marks;
};
ForwardResult empty_result(const KernelProblem& problem);
cuda::ForwardParams forward_params(const KernelProblem& problem, const ForwardResult& to);

/// Of the rows' gradient (with the keys' of a self-relation), or of the keys' of the pair form; `gradient` and `marks`
/// are not set.
cuda::BackwardParams row_gradient_params(const KernelProblem& problem,
                                         const at::Tensor& grad_kl,
                                         const ForwardResult& statistics);
cuda::BackwardParams key_gradient_params(const KernelProblem& problem,
                                         const at::Tensor& grad_kl,
                                         const ForwardResult& statistics);

}  // namespace linearard::testing
