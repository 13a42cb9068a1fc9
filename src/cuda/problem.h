#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <params.h>

#include "arguments.h"
#include "cuda/tensors.h"
#include "logit_form.h"

// What the host side of all CUDA kernels works on.

namespace linearard::cuda {

/// Both forms of a call: rows and keys of either side.
struct Problem {
  at::Tensor student_rows;
  at::Tensor student_keys;
  at::Tensor teacher_rows;
  at::Tensor teacher_keys;
  VisibilityMemory memory;
  bool relation;  ///< rows and keys are the same tokens
  double scale_student;
  double scale_teacher;
  linearard::Divergence divergence;
  double beta;
  bool packed;         ///< several sequences
  bool deterministic;  ///< the same bits in every run

  int64_t batch() const { return student_rows.size(0); }
  int64_t heads() const { return student_rows.size(1); }
  int64_t rows() const { return student_rows.size(2); }
  int64_t keys() const { return student_keys.size(2); }
  at::Device device() const { return student_rows.device(); }
  bool empty() const { return batch() * heads() * rows() * keys() == 0; }
  bool float64() const {
    return statistics_dtype_of(student_rows, student_keys, teacher_rows, teacher_keys) == at::kDouble;
  }
};

/// @param shared what the rows see, for calls of several relations that see the same: used where it is there, else
///        written
Problem problem_of(const RelationArguments& arguments, std::optional<VisibilityMemory>* shared = nullptr);
Problem problem_of(const AttentionArguments& arguments);

Divergence kernel_divergence(linearard::Divergence divergence);

/// KL(Q || P) is KL(P || Q) with the roles exchanged.
void exchange_roles(Problem& problem);

/// Brings x into the teacher's scale where the scales allow to compute the logits' difference as one; 0 where they do
/// not.
double difference_ratio(const Problem& problem);

/// Of the dense kernels, without outputs.
/// @param form of float64 inputs; @param ratios of measured_ratios
ForwardParams forward_params(const Problem& problem, const LogitForm* form, const at::Tensor& ratios);

/// Whether the vectors decide about the difference form too, head by head: for the generic kernels.
bool measures_closeness(const Problem& problem);

/// What ForwardParams::difference_ratios points to, made on the device; undefined where nothing reads it.
at::Tensor measured_ratios(const Problem& problem);

/// Statistics [B, H, N] of the rows.
inline at::Tensor row_tensor(const Problem& problem, at::ScalarType dtype) {
  return at::empty({problem.batch(), problem.heads(), problem.rows()},
                   problem.student_rows.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
}

/// Where the forward kernels write; undefined tensors are not wanted.
struct RowTensors {
  at::Tensor kl;
  at::Tensor lse_student;
  at::Tensor lse_teacher;
};

}  // namespace linearard::cuda
