#pragma once

#include <vector>

#include "arguments.h"

// Every public entry checks its arguments here before any work. An error names the operator, the argument, what was
// expected and what came. Sizes are compared symbolically, so that the checks also run while a graph is traced.

namespace linearard {

/// Checks the arguments of the relation kernels and fills in the scales.
RelationArguments check_relation(const char* operator_name,
                                 const at::Tensor& student,
                                 const at::Tensor& teacher,
                                 const RelationOptions& options,
                                 const char* student_name = "student",
                                 const char* teacher_name = "teacher");

/// Checks the arguments of several relations as one: lists of the same length, at least 1, and what check_relation asks
/// of each pair, which an error names students[i] and teachers[i]. All share B, N and the device.
std::vector<RelationArguments> check_relations(const char* operator_name,
                                               at::TensorList students,
                                               at::TensorList teachers,
                                               const RelationOptions& options);

/// Checks the one tensor of relation_lse; it becomes both sides of the result.
RelationArguments check_lse(const char* operator_name, const at::Tensor& x, const RelationOptions& options);

AttentionArguments check_attention(const char* operator_name,
                                   const at::Tensor& query_student,
                                   const at::Tensor& key_student,
                                   const at::Tensor& query_teacher,
                                   const at::Tensor& key_teacher,
                                   const AttentionOptions& options);

/// Statistics or an upstream gradient of the rows: [B, H, N] like `rows_of`, float32 or float64.
void check_row_tensor(const char* operator_name,
                      const char* argument,
                      const at::Tensor& tensor,
                      const at::Tensor& rows_of);

/// The same of lists: a tensor for each of `rows_of`.
void check_row_tensors(const char* operator_name, const char* argument, at::TensorList tensors, at::TensorList rows_of);

/// row_weight [B, N] like the rows of `rows_of` [B, H, N, D]; num_items a scalar, with Reduction::kMean only.
void check_reduction(const char* operator_name,
                     const at::Tensor& rows_of,
                     const std::optional<at::Tensor>& row_weight,
                     Reduction reduction,
                     const std::optional<at::Tensor>& num_items);

/// The teacher is frozen: a tensor that autograd would have to differentiate is an error.
void check_frozen(const char* operator_name, const char* argument, const at::Tensor& tensor);
void check_frozen(const char* operator_name, const char* argument, at::TensorList tensors);

/// Values of cu_seqlens (read on the host): 0 = c_0 < c_1 < ... = length. Called by the kernels, which have values.
void check_sequence_boundaries(const char* operator_name,
                               const char* argument,
                               const at::Tensor& cu_seqlens,
                               int64_t length);

}  // namespace linearard
