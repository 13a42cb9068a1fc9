#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/device_math.cuh"
#include "../common/visibility.cuh"

// Tiles of the kernels that take everything: any dtype (student's and teacher's may differ), any dimension, any
// strides. 256 threads share a tile of 64 x 64 logits, 4 x 4 each; products are fused multiply-adds of `Real`.

namespace linearard::cuda::generic {

inline constexpr int kThreads = 256;
inline constexpr int kTile = 64;   ///< rows and columns
inline constexpr int kDepth = 16;  ///< elements of the vectors staged at a time
inline constexpr int kPitch = kTile + 4;
inline constexpr int kPer = 4;  ///< rows and columns of a thread

template <typename Real>
__device__ Real read_element(const Vectors& v, int64_t at) {
  switch (v.type) {
    case Scalar::kFloat:
      return static_cast<const float*>(v.data)[at];
    case Scalar::kDouble:
      return static_cast<Real>(static_cast<const double*>(v.data)[at]);
    case Scalar::kHalf:
      return __half2float(static_cast<const __half*>(v.data)[at]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[at]);
  }
}

/// Where the vectors of one head begin, in elements.
__device__ inline int64_t offset_of_head(const Vectors& v, int batch, int head) {
  return batch * v.batch_stride + (head / v.group) * v.head_stride;
}

/// Parts of the vectors, transposed. The student's slots hold x - y and x where s - t is computed as a difference.
template <typename Real>
struct alignas(16) Staged {
  Real owner_student[kDepth][kPitch];
  Real owner_teacher[kDepth][kPitch];
  Real other_student[kDepth][kPitch];
  Real other_teacher[kDepth][kPitch];
  Real other_difference[kDepth][kPitch];
};

/// One side of a problem: its owners and others, and what products of them are worth.
template <typename Real>
struct Side {
  const Vectors& owners;
  const Vectors& others;
  int64_t owner_offset;
  int64_t other_offset;
  Real multiplier;
  Real scale;  ///< of the products, in logit units
};

template <typename Real>
struct Products {
  Side<Real> student;
  Side<Real> teacher;
  /// sqrt(scale_student / scale_teacher), which brings x into the teacher's scale: s - t is then
  /// scale_teacher (d_i . x_j + y_i . d_j) with d = x - y, and keeps its digits where s and t agree. 0: s and t apart.
  double difference_ratio;
  bool teacher_only;
};

struct Tokens {
  int first;
  int count;
  const uint8_t* mask;
};

/// One element, 0 where there is nothing. Infinities become NaN in double, where logits are cut and would hide them.
template <typename Real>
__device__ Real element(const Vectors& v, int64_t head, const Tokens& tokens, int token, int d, Real multiplier) {
  if (token >= tokens.count || d >= v.dim || (tokens.mask != nullptr && tokens.mask[token] == 0)) return 0;
  const Real x = read_element<Real>(v, head + token * v.token_stride + d) * multiplier;
  return sizeof(Real) == sizeof(double) && isinf(x) ? static_cast<Real>(NAN) : x;
}

/// ratio x - y with one rounding: that of ratio x alone would be of the size of a small difference.
template <typename Real>
__device__ Real difference(double ratio, Real x, Real y) {
  return ratio == 1 ? x - y : static_cast<Real>(fma(ratio, static_cast<double>(x), -static_cast<double>(y)));
}

/// Tokens [first, first + 64) x elements [depth, depth + 16) of one head into shared memory.
template <typename Real>
__device__ void stage(
    Staged<Real>& staged, const Products<Real>& p, const Tokens& owners, const Tokens& others, int depth) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
    const int row = i / kDepth;
    const int d = depth + i % kDepth;
    const int k = i % kDepth;
    const Real owner_teacher =
        element(p.teacher.owners, p.teacher.owner_offset, owners, owners.first + row, d, p.teacher.multiplier);
    const Real other_teacher =
        element(p.teacher.others, p.teacher.other_offset, others, others.first + row, d, p.teacher.multiplier);
    staged.owner_teacher[k][row] = owner_teacher;
    staged.other_teacher[k][row] = other_teacher;
    if (p.teacher_only) continue;
    Real owner = element(p.student.owners, p.student.owner_offset, owners, owners.first + row, d, p.student.multiplier);
    Real other = element(p.student.others, p.student.other_offset, others, others.first + row, d, p.student.multiplier);
    if (p.difference_ratio != 0) {
      staged.other_difference[k][row] = difference(p.difference_ratio, other, other_teacher);
      owner = difference(p.difference_ratio, owner, owner_teacher);
      if (p.difference_ratio != 1) other = static_cast<Real>(p.difference_ratio * other);
    }
    staged.owner_student[k][row] = owner;
    staged.other_student[k][row] = other;
  }
}

/// Finite inputs of any size: differences and exponents of double logits stay finite. NaN passes both comparisons.
template <typename Real>
__device__ Real cut_logit(Real x) {
  if constexpr (sizeof(Real) == sizeof(double)) {
    constexpr Real kLimit = 1e150;
    if (x > kLimit) return kLimit;
    if (x < -kLimit) return -kLimit;
  }
  return x;
}

/// t and s - t of this thread's rows 4 (thread / 16) + a and columns 4 (thread % 16) + b.
template <typename Real>
__device__ void logits_of_tile(Real (&teacher)[kPer][kPer],
                               Real (&delta)[kPer][kPer],
                               Staged<Real>& staged,
                               const Products<Real>& p,
                               const Tokens& owners,
                               const Tokens& others) {
  const int row = static_cast<int>(threadIdx.x) / 16 * kPer;
  const int column = static_cast<int>(threadIdx.x) % 16 * kPer;
#pragma unroll
  for (int a = 0; a < kPer; ++a)
#pragma unroll
    for (int b = 0; b < kPer; ++b)
      teacher[a][b] = delta[a][b] = 0;
  const int dim = p.teacher_only ? p.teacher.owners.dim : max(p.student.owners.dim, p.teacher.owners.dim);
  for (int depth = 0; depth < dim; depth += kDepth) {
    __syncthreads();
    stage(staged, p, owners, others, depth);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      Real y[kPer];
#pragma unroll
      for (int a = 0; a < kPer; ++a)
        y[a] = staged.owner_teacher[k][row + a];
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        const Real z = staged.other_teacher[k][column + b];
#pragma unroll
        for (int a = 0; a < kPer; ++a)
          teacher[a][b] = fma(y[a], z, teacher[a][b]);
      }
      if (p.teacher_only) continue;
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        const Real z = staged.other_student[k][column + b];
#pragma unroll
        for (int a = 0; a < kPer; ++a)
          delta[a][b] = fma(staged.owner_student[k][row + a], z, delta[a][b]);
      }
      if (p.difference_ratio == 0) continue;
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        const Real z = staged.other_difference[k][column + b];
#pragma unroll
        for (int a = 0; a < kPer; ++a)
          delta[a][b] = fma(y[a], z, delta[a][b]);
      }
    }
  }
#pragma unroll
  for (int a = 0; a < kPer; ++a)
#pragma unroll
    for (int b = 0; b < kPer; ++b) {
      teacher[a][b] = cut_logit(teacher[a][b] * p.teacher.scale);
      if (p.teacher_only) continue;
      delta[a][b] = p.difference_ratio != 0 ? cut_logit(delta[a][b] * p.teacher.scale)
                                            : cut_logit(delta[a][b] * p.student.scale) - teacher[a][b];
    }
}

/// Over the 16 threads that share a row.
template <typename Real>
__device__ Real sum_of_row(Real x) {
#pragma unroll
  for (int lane = 1; lane < 16; lane *= 2)
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}
template <typename Number>
__device__ Number maximum_of_row(Number x) {
#pragma unroll
  for (int lane = 1; lane < 16; lane *= 2) {
    const Number other = __shfl_xor_sync(0xffffffffu, x, lane);
    x = other > x ? other : x;
  }
  return x;
}

// --- the divergences beside the forward KL, of one key; l = log P, r = log Q / P -------------------------------------

template <typename Real>
__device__ Real student_probability(Real log_teacher, Real r) {
  return Base<Real>::exp(fmin(log_teacher + r, Real(0)));
}

/// The key's part of the Jensen-Shannon divergence: a sum over keys of non-negative terms, each small when r is.
template <typename Real>
__device__ Real jsd_term(Real log_teacher, Real r, Real beta) {
  using B = Base<Real>;
  if (isnan(r)) return r;  // the minima and maxima below would drop it
  const Real larger = B::exp(fmin(log_teacher + fmax(r, Real(0)), Real(0)));
  // Relative to the larger of the two probabilities the other one is e^rho; beyond -45 nats it is lost in rounding.
  const Real rho = fmax(-fabs(r) * B::kNats, Real(-45));
  const Real decay = expm1(rho);
  const Real weight = r > 0 ? beta : 1 - beta;
  const Real v = weight * decay;
  const Real entropy_of_smaller = weight * (rho * decay - (decay - rho));
  return larger * (entropy_of_smaller - ((v + 1) * log1p(v) - v));
}

/// log Q / M of the mixture M = beta P + (1 - beta) Q, in logit units.
template <typename Real>
__device__ Real log_student_to_mixture(Real r, Real beta) {
  using B = Base<Real>;
  const Real weight = r > 0 ? beta : 1 - beta;
  return fmin(r, Real(0)) - log1p(-weight * one_minus_exp(fabs(r))) / B::kNats;
}

/// What the student's probabilities average: log Q / P or log Q / M, in logit units.
template <typename Real>
__device__ Real student_value(Divergence divergence, Real r, Real beta) {
  return divergence == Divergence::kJSD ? log_student_to_mixture(r, beta) : r;
}

}  // namespace linearard::cuda::generic
