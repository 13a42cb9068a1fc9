#pragma once

#include <cuda_runtime_api.h>

#include "../triangular/params.h"

// The row-wise kernels: a block of threads owns tokens, walks over all others that they meet, and writes its owners'
// results once. Nothing is added in global memory: the same bits in every run.

namespace linearard::cuda::sm90 {

/// What the pairs of a walk are.
enum class Pairs : int {
  kRelation,  ///< of one set of tokens, each as a row and as a key of the other one
  kQueries,   ///< owners are rows, others their keys
  kKeys,      ///< owners are keys, others the rows that see them
};

/// What G_ij = weight_i 2^(t_ij - bias_i) (2^(s_ij - t_ij - shift_i) - 1) needs of its row. The exponent has kReserve
/// added and the weight gives it back: then a pair whose teacher's probability float cannot hold has a student's that
/// does not count, or is not finite.
struct alignas(16) RowToken {
  float bias;    ///< lse_t - kReserve
  float shift;   ///< lse_s - lse_t
  float weight;  ///< upstream gradient x 2^-kReserve; 0: a row without divergence
  float unused;
};
inline constexpr float kReserve = 64.f;

struct RowsForwardParams {
  Vectors own_student;
  Vectors own_teacher;
  Vectors other_student;
  Vectors other_teacher;
  int batch;
  int heads;   ///< of the owners
  int group;   ///< heads of the owners that share one of the others
  int owners;  ///< of a head
  int others;
  bool causal;
  int offset;  ///< keys - rows: a row sees keys up to its own number + offset
  LogitFactors factors;
  // A relation's sums over the other tokens, as TriangularForwardParams has them.
  const ForwardToken* token_values;
  const float* centers;
  const int* wide_heads;  ///< [B heads] 1: left to the dense kernels; null: none
  float* sums;
  OwnLogit* own;
  // Results of the rows of two sets [B, heads, owners], nats, and those left to the dense kernels.
  float* kl;
  float* lse_student;
  float* lse_teacher;
  int* row_counts;  ///< [B heads] rows listed, zero before
  int* row_lists;   ///< [B heads, owners]
  bool ordered;     ///< 1 or 0 for each row instead, whether it is listed
};

struct RowsBackwardParams {
  Vectors own_student;
  Vectors own_teacher;
  Vectors other_student;
  Vectors other_teacher;
  int batch;
  int heads;        ///< of the owners
  int other_heads;  ///< of the others that each head of the owners walks over; those of a group follow each other
  int group;        ///< heads of the owners that share one of the others
  int owners;       ///< of a head
  int others;
  bool causal;
  int offset;  ///< keys - rows: a row sees keys up to its own number + offset
  LogitFactors factors;
  const void* own_values;    ///< [B, heads, owners] BackwardToken, or RowToken; null for keys
  const void* other_values;  ///< [B, heads x other_heads / group, others] likewise; null for queries
  const int* wide_heads;     ///< [B heads] 1: left to the dense kernels; null: none
  void* gradient;            ///< [B heads, owners, D] of the vectors' type
  double output_scale;
  const float* largest_grad;  ///< max |upstream gradient|, for half only
  RedoMarks redo;
};

}  // namespace linearard::cuda::sm90
