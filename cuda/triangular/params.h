#pragma once

#include <climits>

#include "../params.h"

// What the triangular kernels are given: self-relations, each pair of tokens once. Logits are in units of log 2.

namespace linearard::cuda {

/// What a pair needs of either token in the forward: E_ij = 2^(t_ij - bias_i - bias_j).
struct alignas(8) ForwardToken {
  float bias;    ///< t_ii / 2 - kHeadroom / 2
  float weight;  ///< 2^(t_ii / 2 - center): E_ij weight_j is row i's term, E_ij weight_i is row j's. 0: no such token
};

/// The logit of a token with itself, in the forward's last step. The kernels write it again, as the tensor cores round
/// it: they cut off, which moves a row's logits one way, and what moves all of them alike leaves the row as it is.
struct alignas(8) OwnLogit {
  float teacher;     ///< t_ii
  float difference;  ///< s_ii - t_ii
};

/// What a pair needs of either token in the backward, with the same E_ij of the log-sum-exps:
///   H_ij = E_ij (key_j (w row_ratio_i - row_i) + key_i (w row_ratio_j - row_j)),   w = 2^(s_ij - t_ij)
struct alignas(16) BackwardToken {
  float bias;       ///< lse_t / 2 - kHeadroom / 2
  float key;        ///< 2^(lse_t / 2 - center - kHeadroom / 2)
  float row;        ///< upstream gradient x 2^(center - lse_t / 2 - kHeadroom / 2)
  float row_ratio;  ///< row x 2^(lse_t - lse_s)
};

// Heads whose logits are small and close to each other are plain: no bias depends on the token, and the kernels of
// Hopper leave it out. In the forward bias = 0 and weight = 1; in the backward bias is half of C for all tokens, key =
// 1 and row = upstream gradient x 2^(C - lse_t).

/// Largest t_ii of a plain head in the forward, and largest spread of its lse_t in the backward, nats.
inline constexpr float kPlainReach = 60.f;
/// Largest exponent of a plain head's 2^(t_ij - C) in the backward. What lies so far below that float loses it has a
/// probability below 2^-99.
inline constexpr float kPlainHighest = 60.f;

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

/// The sums of a row over its other tokens, as planes [P][kSums][N] of `sums`; e = E_ij weight_j:
///   sum e,   sum e x / student,   sum e phi(x),   phi(x) = e^x - 1 - x (x in nats)
inline constexpr int kSums = 3;

/// Most relations that one launch serves: with their tensor maps they fit into 4 KiB of parameters.
inline constexpr int kLargestGroup = 8;

/// Relations that one launch serves: of one batch, number of tokens, type and dimension, mask and scales. The heads of
/// all batch entries of a relation are consecutive problems, and so are the relations; arrays [P, ...] are of all of
/// them.
struct RelationGroup {
  int problems;              ///< P, the sum of B H
  int first[kLargestGroup];  ///< problem of a relation; INT_MAX where there is none
  int heads[kLargestGroup];

  /// @param heads [count] of the relations
  static RelationGroup of(int batch, const int* heads, int count) {
    RelationGroup group{};
    for (int r = 0; r < kLargestGroup; ++r) {
      group.first[r] = r < count ? group.problems : INT_MAX;
      group.heads[r] = r < count ? heads[r] : 1;
      if (r < count) group.problems += batch * heads[r];
    }
    return group;
  }
};

/// The vectors of a group's relations.
struct GroupVectors {
  Vectors student[kLargestGroup];
  Vectors teacher[kLargestGroup];
};

/// How much of the plane a block of rows visits.
enum class Traversal : int {
  kTriangular,  ///< each pair once, for its row and its column: sums and gradients meet in atomic additions
  kRows,        ///< every pair for its row: twice the work, no order of additions that could change
};

struct TriangularForwardParams {
  Vectors student;  ///< of the first relation; row by row, the kernels of Hopper serve no other
  Vectors teacher;
  int batch;
  int heads;  ///< of the first relation
  int tokens;
  bool causal;  ///< keys j <= i; visited once by either traversal
  Traversal traversal;
  const uint8_t* mask;  ///< [B, N] 1 = a real token; null: all are
  LogitFactors factors;
  const ForwardToken* token_values;  ///< [P, N]
  // Or what Hopper's triangular kernel makes them of:
  const float* references;  ///< [P, N] t_ii
  const int* largest;       ///< as PrepareForwardParams
  // Read; by that kernel written.
  float* centers;    ///< [P]
  int* wide_heads;   ///< [P] 1: left to the dense kernels
  int* plain_heads;  ///< [P] 1: plain
  float* sums;       ///< [P, kSums, N], zero before
  OwnLogit* own;     ///< [P, N] of heads that are not wide: written
  RelationGroup group;
  GroupVectors vectors;
};

struct TriangularBackwardParams {
  Vectors student;  ///< of the first relation; row by row, the kernels of Hopper serve no other
  Vectors teacher;
  int batch;
  int heads;  ///< of the first relation
  int tokens;
  bool causal;  ///< pairs with j <= i as rows only: H_ij = G_ij
  Traversal traversal;
  const uint8_t* mask;  ///< [B, N]
  LogitFactors factors;
  const BackwardToken* token_values;  ///< [P, N]
  const int* wide_heads;              ///< [P]
  const int* plain_heads;             ///< [P] 1: plain; null: none
  float* gradient;                    ///< [P, N, D] sum_j H_ij x_j, without the scale; zero before
  // Row by row, Hopper's kernels write the gradient itself instead.
  void* result;  ///< [B H, N, D] of the vectors' type
  double output_scale;
  const float* largest_grad;
  RedoMarks redo;
  RelationGroup group;
  GroupVectors vectors;
};

/// Before the forward: values of the tokens, and zeros for what the steps after it add to.
struct PrepareForwardParams {
  RelationGroup group;
  GroupVectors vectors;
  int tokens;
  const uint8_t* mask;   ///< [B, N]
  double scale_student;  ///< of the logits, nats
  double scale_teacher;
  int* largest;                ///< [P, ceil(N / kRedoRows)] bits of the largest t_ii of a block
  OwnLogit* own;               ///< [P, N]
  float* references;           ///< [P, N] t_ii, which the kernel makes the rest of; null: this step does
  ForwardToken* token_values;  ///< [P, N]
  float* centers;              ///< [P]
  int* wide_heads;             ///< [P]
  // Zeroed:
  float* sums;                    ///< [P, kSums, N]
  int* row_counts;                ///< [P]
  RedoMarks redo[kLargestGroup];  ///< of the relations
};

/// Results [B H, N] of one relation's rows, nats.
struct RowResults {
  float* kl;
  float* lse_student;
  float* lse_teacher;
};

/// After the forward: results of the rows, and the list of those that the dense kernels compute again.
struct FinishForwardParams {
  RelationGroup group;
  Visibility visibility;
  LogitFactors factors;
  const ForwardToken* token_values;
  const float* references;  ///< in place of token_values, with plain_heads
  const OwnLogit* own;
  const float* centers;
  const int* wide_heads;
  const int* plain_heads;
  const float* sums;               ///< [P, kSums, N]
  RowResults rows[kLargestGroup];  ///< of the relations
  int* row_counts;                 ///< [P] rows listed, zero before
  int* row_lists;                  ///< [P, N]
  bool ordered;  ///< list rows in their order: which of them are computed together is the same in every run
};

/// What the backward of one relation reads of its rows, and its marks.
struct RowGradients {
  const float* grad_kl;       ///< [B H, N], or one number for all rows
  bool one_grad;              ///< which of the two
  const float* lse_student;   ///< [B H, N], nats
  const float* lse_teacher;   ///< likewise
  const float* largest_grad;  ///< max |grad_kl|, for half only
  float* row_grads;           ///< [B H, N] grad_kl for the dense kernels; null: not wanted
  RedoMarks redo;
};

/// Marks of rows become lists of them, in place.
struct OrderRowsParams {
  int problems;
  int rows;
  int* row_counts;  ///< [problems] written
  int* row_lists;   ///< [problems, rows] 1: listed
};

/// Before the backward: values of the tokens, and zeros for what the steps after it add to.
struct PrepareBackwardParams {
  RelationGroup group;
  Visibility visibility;
  RowGradients rows[kLargestGroup];  ///< of the relations
  BackwardToken* token_values;
  int* wide_heads;   ///< [P]
  int* plain_heads;  ///< [P]; null: no head is to be plain
  // Zeroed, and the marks of the relations:
  float* gradient;          ///< aligned to 16 bytes
  int64_t gradient_floats;  ///< a multiple of 4
};

/// The gradient of one relation, and what it is marked with.
struct VectorGradient {
  void* gradient;  ///< [B H, N, D]
  const float* largest_grad;
  RedoMarks redo;
};

/// After the backward: the sums in float become the gradient, of the student's type. The keys of two sets are a
/// relation of one.
struct FinishBackwardParams {
  Scalar type;
  RelationGroup group;
  int tokens;
  int dim;
  double output_scale;
  const int* wide_heads;  ///< null: none
  const float* sums;      ///< [P, N, D]
  VectorGradient relations[kLargestGroup];
};

}  // namespace linearard::cuda
