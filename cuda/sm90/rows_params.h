#pragma once

#include "../triangular/params.h"
#include "rows.h"

// Calls of the dense kernels on two sets as the row-wise kernels take them.

namespace linearard::cuda::sm90 {

/// Vectors of shared keys by their own heads.
inline Vectors by_own_heads(Vectors vectors) {
  vectors.group = 1;
  return vectors;
}

inline LogitFactors factors_of(double scale) {
  const auto factor = static_cast<float>(scale * 1.4426950408889634);
  return {factor, factor, 0};
}

/// @param ordered lists hold a mark of each row, for another kernel to make lists of
inline RowsForwardParams rows_params_of(const ForwardParams& p, int* row_counts, int* row_lists, bool ordered) {
  RowsForwardParams rows{};
  rows.own_student = p.student_rows;
  rows.own_teacher = p.teacher_rows;
  rows.other_student = by_own_heads(p.student_keys);
  rows.other_teacher = by_own_heads(p.teacher_keys);
  rows.batch = p.batch;
  rows.heads = p.heads;
  rows.group = p.student_keys.group;
  rows.owners = p.visibility.rows;
  rows.others = p.visibility.keys;
  rows.causal = p.visibility.causal;
  rows.offset = p.visibility.keys - p.visibility.rows;
  rows.factors = factors_of(p.scale_student);
  rows.kl = static_cast<float*>(p.kl);
  rows.lse_student = static_cast<float*>(p.lse_student);
  rows.lse_teacher = static_cast<float*>(p.lse_teacher);
  rows.row_counts = row_counts;
  rows.row_lists = row_lists;
  rows.ordered = ordered;
  return rows;
}

/// @param row_values [B, row heads, rows], written before by prepare_row_tokens
inline RowsBackwardParams rows_params_of(const BackwardParams& p, const RowToken* row_values) {
  RowsBackwardParams rows{};
  rows.own_student = by_own_heads(p.owner_student);
  rows.own_teacher = by_own_heads(p.owner_teacher);
  rows.other_student = by_own_heads(p.other_student);
  rows.other_teacher = by_own_heads(p.other_teacher);
  rows.batch = p.batch;
  rows.heads = p.heads;
  rows.other_heads = p.row_term ? 1 : p.other_heads;
  rows.group = p.row_term ? p.other_student.group : 1;
  rows.owners = p.row_term ? p.visibility.rows : p.visibility.keys;
  rows.others = p.row_term ? p.visibility.keys : p.visibility.rows;
  rows.causal = p.visibility.causal;
  rows.offset = p.visibility.keys - p.visibility.rows;
  rows.factors = factors_of(p.scale_student);
  (p.row_term ? rows.own_values : rows.other_values) = row_values;
  rows.gradient = p.gradient;
  rows.output_scale = p.output_scale;
  rows.largest_grad = p.largest_grad;
  rows.redo = p.redo;
  return rows;
}

/// Values of the rows for a backward, and zeros for what it adds to.
struct RowTokenParams {
  int64_t count;  ///< of all heads' rows
  Visibility visibility;
  const float* grad_kl;
  const float* lse_student;  ///< nats
  const float* lse_teacher;
  const float* largest_grad;  ///< null but for half
  RowToken* values;
  float* sums;         ///< zeroed, aligned to 16 bytes; null: none
  int64_t sum_floats;  ///< a multiple of 4
};
/// Floats of the sums of the keys' gradient.
inline int64_t sum_floats_of(const BackwardParams& keys) {
  return int64_t{keys.batch} * keys.heads * keys.visibility.keys * keys.owner_student.dim;
}
inline RowTokenParams row_token_params_of(const BackwardParams& p,
                                          RowToken* values,
                                          float* sums = nullptr,
                                          int64_t sum_floats = 0) {
  const int64_t row_heads = int64_t{p.heads} * (p.row_term ? 1 : p.other_heads);
  return {p.batch * row_heads * p.visibility.rows,
          p.visibility,
          static_cast<const float*>(p.grad_kl),
          static_cast<const float*>(p.lse_student),
          static_cast<const float*>(p.lse_teacher),
          p.largest_grad,
          values,
          sums,
          sum_floats};
}
cudaError_t prepare_row_tokens(const RowTokenParams& params, cudaStream_t stream);

/// The keys' gradient out of its sums.
inline FinishBackwardParams finish_params_of(const BackwardParams& keys, const float* sums) {
  FinishBackwardParams finish{};
  finish.type = keys.owner_student.type;
  finish.group = RelationGroup::of(keys.batch, &keys.heads, 1);
  finish.tokens = keys.visibility.keys;
  finish.dim = keys.owner_student.dim;
  finish.output_scale = keys.output_scale;
  finish.sums = sums;
  finish.relations[0] = {keys.gradient, keys.largest_grad, keys.redo};
  return finish;
}

}  // namespace linearard::cuda::sm90
