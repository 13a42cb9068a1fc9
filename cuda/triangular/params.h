#pragma once

#include "../params.h"

// What the triangular kernels are given: one self-relation, each pair of tokens once. Logits are in units of log 2.

namespace linearard::cuda {

/// What a pair needs of either token in the forward: E_ij = 2^(t_ij - bias_i - bias_j).
struct alignas(8) ForwardToken {
  float bias;    ///< t_ii / 2 - kHeadroom / 2
  float weight;  ///< 2^(t_ii / 2 - center): E_ij weight_j is row i's term, E_ij weight_i is row j's. 0: no such token
};

/// What a pair needs of either token in the backward, with the same E_ij of the log-sum-exps:
///   H_ij = E_ij (row_i key_j (w ratio_i - 1) + key_i row_j (w ratio_j - 1)),   w = 2^(s_ij - t_ij)
struct alignas(16) BackwardToken {
  float bias;   ///< lse_t / 2 - kHeadroom / 2
  float key;    ///< 2^(lse_t / 2 - center - kHeadroom / 2)
  float row;    ///< upstream gradient x 2^(center - lse_t / 2 - kHeadroom / 2)
  float ratio;  ///< 2^(lse_t - lse_s)
};

/// Added to the exponent of E_ij <= 1 (nats: 30): float holds what is left of it where the tokens of a pair lie far
/// apart. See docs/mathematics.md for the bound.
inline constexpr float kHeadroom = 43.f;
/// Largest spread of t_ii or lse_t within a head, nats: beyond it the dense kernels compute the head.
inline constexpr float kLargestSpread = 180.f;

/// The logits of a pair out of the products S of the student's and T of the teacher's vectors:
///   t = teacher T,   x = s - t = student (S - T + excess T)
/// The difference of the raw products is exact where they are close; scaling S and T first would round both.
struct LogitFactors {
  float teacher;
  float student;
  float excess;  ///< 1 - teacher / student
};

/// The sums of a row over its other tokens, as planes [B H][kSums][N] of `sums`; e = E_ij weight_j:
///   sum e,   sum e x / student,   sum e phi(x),   phi(x) = e^x - 1 - x (x in nats)
inline constexpr int kSums = 3;

struct TriangularForwardParams {
  Vectors student;
  Vectors teacher;
  int batch;
  int heads;
  int tokens;
  LogitFactors factors;
  const ForwardToken* token_values;  ///< [B H, N]
  const int* wide_heads;             ///< [B H] 1: left to the dense kernels
  float* sums;                       ///< [B H, kSums, N], zero before
};

struct TriangularBackwardParams {
  Vectors student;
  Vectors teacher;
  int batch;
  int heads;
  int tokens;
  bool causal;  ///< pairs with j <= i as rows only: H_ij = row_i key_j (w ratio_i - 1) E_ij, twice on the diagonal
  LogitFactors factors;
  const BackwardToken* token_values;  ///< [B H, N]
  const int* wide_heads;              ///< [B H]
  float* gradient;                    ///< [B H, N, D] sum_j H_ij x_j without the scale, zero before
};

}  // namespace linearard::cuda
