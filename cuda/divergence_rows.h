#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace linearard::cuda {

/// Rows of logits in float, dense: `rows` x `keys`. A key that a row does not see has t = -infinity and delta = 0.
struct LogitRows {
  const float* teacher;  ///< [rows, keys] t
  const float* delta;    ///< [rows, keys] s - t
  int64_t rows;
  int64_t keys;
};

struct RowOutputs {
  float* kl;           ///< [rows] KL(teacher || student), nats
  float* lse_student;  ///< [rows]
  float* lse_teacher;  ///< [rows]
};

/// Both log-sum-exps and the divergence of each row, one block of threads for a row. Returns the launch's error.
cudaError_t forward_kl_rows(const LogitRows& logits, const RowOutputs& outputs, cudaStream_t stream);

struct GradientRows {
  const float* lse_teacher;     ///< [rows]
  const float* lse_difference;  ///< [rows] lse_student - lse_teacher
  const float* weight;          ///< [rows] upstream gradient
  float* gradient;              ///< [rows, keys] weight (Q - P); may be the teacher's logits
  int64_t rows_of_head;         ///< rows of each head: row r is row r % rows_of_head of its head
  int64_t diagonal;             ///< column of the first row's own key, which is minus the sum of the others; -1: none
};

cudaError_t forward_kl_gradient_rows(const LogitRows& logits, const GradientRows& gradient, cudaStream_t stream);

}  // namespace linearard::cuda
