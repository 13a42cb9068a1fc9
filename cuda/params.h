#pragma once

#include <cstdint>

// What the kernels are given: plain pointers, sizes and strides. Strides count elements; the last dimension is
// contiguous. "Rows" are the tokens whose distributions are compared, "keys" the tokens they are distributions over; in
// a self-relation both are the same tokens.

namespace linearard::cuda {

enum class Scalar : int { kFloat, kDouble, kHalf, kBFloat16 };

enum class Divergence : int { kForwardKL, kReverseKL, kJSD };

/// Vectors [B, heads, n, dim] of one tensor, read in place.
struct Vectors {
  const void* data;
  Scalar type;
  int dim;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
  int group;     ///< rows' heads that share one head of this tensor: 1, or Hq / Hk for keys
  bool aligned;  ///< vectors are whole chunks of 16 bytes at addresses that are multiples of 16
};

/// The positions that one token sees, or is seen by: [begin, end), of which `count` are real tokens.
struct Range {
  int begin;
  int end;
  int count;
};

/// Which rows see which keys. Without ranges: all, or, causal, key j <= row i + (keys - rows).
struct Visibility {
  int rows;
  int keys;
  bool causal;
  const Range* row_ranges;  ///< [B, rows] keys that a row sees, empty for padding; null: see above
  const Range* key_ranges;  ///< [B, keys] rows that may see a key; null together with row_ranges
  const uint8_t* key_mask;  ///< [B, keys] 1 = a real token; null: all are
  const uint8_t* row_mask;  ///< [B, rows]
};

/// Blocks of rows whose results float could not hold: [0] whether there is any, then [B, heads, ceil(rows / 64)].
/// Zeroed before the first kernel of a call; the double kernels after it do the marked blocks again.
using RedoMarks = int*;
inline constexpr int kRedoRows = 64;

struct ForwardParams {
  Vectors student_rows;
  Vectors student_keys;
  Vectors teacher_rows;
  Vectors teacher_keys;
  int batch;
  int heads;  ///< of the rows
  Visibility visibility;
  double scale_student;
  double scale_teacher;
  double student_multiplier;  ///< power of two on the vectors against overflow of double products, else 1
  double teacher_multiplier;
  double difference_ratio;          ///< generic kernels: see generic/tiles.cuh; 0: none
  const double* difference_ratios;  ///< [B, heads] what takes its place, by head; null: nothing
  bool teacher_only;                ///< only lse_teacher is wanted: the student is not read
  Divergence divergence;
  double beta;
  bool center;        ///< write E_Q[log Q / P] (reverse KL) or E_Q[log Q / M] (JSD) instead of the divergence
  void* kl;           ///< [B, heads, rows] float, or double where `wide_outputs`; nats. Null: not wanted
  void* lse_student;  ///< likewise
  void* lse_teacher;  ///< likewise
  bool wide_outputs;
  /// Only these rows, if not null: [B heads] how many of a head, and [B heads, rows] which, in any order.
  const int* row_counts;
  const int* row_lists;
  RedoMarks redo;
};

/// The gradient of the vectors of the "owner" tokens: each sums over the "other" tokens
///   (G_owner,other as a row, if row_term)  +  (G_other,owner as a key, if column_term)   times the other's vector.
/// Self-relation: owners = others, both terms. Pair form: queries own row terms, keys own column terms.
struct BackwardParams {
  Vectors owner_student;
  Vectors owner_teacher;
  Vectors other_student;
  Vectors other_teacher;
  int batch;
  int heads;        ///< of the owners' gradient
  int other_heads;  ///< heads of the rows that share one head of the owners, 1 but for shared keys
  bool row_term;
  bool column_term;
  Visibility visibility;
  double scale_student;  ///< of the logits
  double scale_teacher;
  double student_multiplier;
  double teacher_multiplier;
  double difference_ratio;
  const double* difference_ratios;  ///< [B, row heads]
  double gradient_multiplier;       ///< on grad_kl
  double output_scale;              ///< on the sum
  Divergence divergence;
  double beta;
  const void* grad_kl;      ///< [B, row heads, rows] float, or double where `wide_grad`
  const void* lse_student;  ///< [B, row heads, rows] float, or double where `wide_statistics`
  const void* lse_teacher;  ///< likewise
  const void* center;       ///< likewise; null for the forward KL
  bool wide_grad;
  bool wide_statistics;
  const float* largest_grad;  ///< max |grad_kl|, of any sign, for half only: keeps H inside its range
  /// Pair form and forward KL, generic kernels: of each row [B, row heads, rows] the key with most of its probability
  /// (-1: none) and that key's G, which is minus the sum of the row's others. The rows' gradient writes, the keys'
  /// reads. Null: not wanted.
  int* dominant_keys;
  double* dominant_gradients;
  void* gradient;         ///< [B, heads, owners, dim] contiguous, of the student's type
  const int* only_heads;  ///< [B heads] 0: not this one; null: all
  RedoMarks redo;
};

/// Heads whose student and teacher are far apart get s and t apart, although the scales allow the difference form.
struct ClosenessParams {
  Vectors student_rows;
  Vectors student_keys;
  Vectors teacher_rows;
  Vectors teacher_keys;
  int batch;
  int heads;  ///< of the rows
  Visibility visibility;
  bool relation;              ///< rows and keys are the same
  double difference_ratio;    ///< that the scales allow, not 0
  double* difference_ratios;  ///< [B, heads]: this, or 0
};

/// Boundaries of packed sequences and masks become ranges.
struct RangeParams {
  int batch;
  int rows;
  int keys;
  bool causal;
  const int64_t* row_boundaries;  ///< [sequences + 1], null: one sequence
  const int64_t* key_boundaries;
  int sequences;
  const uint8_t* row_mask;  ///< [B, rows], null: all real
  const int* key_prefix;    ///< [B, keys + 1] number of real keys before a position; null: all real
  Range* row_ranges;        ///< [B, rows]
  Range* key_ranges;        ///< [B, keys]
};

}  // namespace linearard::cuda
