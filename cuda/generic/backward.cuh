#pragma once

#include "../common/instructions.cuh"
#include "tiles.cuh"

namespace linearard::cuda::generic {

inline constexpr int kSlice = 128;             ///< elements of the gradient that a block computes
inline constexpr int kSlicePer = kSlice / 16;  ///< of a thread

template <typename Real>
struct RowValues {
  Real lse_teacher;  ///< in logit units
  Real lse_difference;
  Real weight;
  Real center;  ///< in logit units
};

template <typename Real>
struct alignas(16) BackwardShared {
  union {
    Staged<Real> staged;
    Real vectors[kDepth][kSlice];  ///< of kDepth others, for the product with H
  };
  Real h[kTile][kPitch];  ///< [other][owner]
  RowValues<Real> owners[kTile];
  RowValues<Real> others[kTile];
  Range other_keys[kTile];
  int dominant_keys[kTile];
  Real dominant_gradients[kTile];
  int scratch[2];
  int block;  ///< the one of the grid that is computed
};

/// Gradient of 64 owners, a slice of 128 elements. Every owner belongs to one block: no atomics.
template <typename Real>
class Backward {
  using B = Base<Real>;

 public:
  __device__ Backward(const BackwardParams& p, BackwardShared<Real>& shared, int64_t block, int slice)
      : p_(p),
        shared_(shared),
        owners_(p.row_term ? p.visibility.rows : p.visibility.keys),
        others_(p.row_term ? p.visibility.keys : p.visibility.rows),
        blocks_((owners_ + kTile - 1) / kTile),
        head_of_all_(block / blocks_),
        batch_(static_cast<int>(head_of_all_ / p.heads)),
        head_(static_cast<int>(head_of_all_ % p.heads)),
        first_(static_cast<int>(block % blocks_) * kTile),
        slice_(slice * kSlice),
        owner_mask_(mask_of(p.row_term ? p.visibility.row_mask : p.visibility.key_mask, owners_)),
        other_mask_(mask_of(p.row_term ? p.visibility.key_mask : p.visibility.row_mask, others_)) {}

  __device__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    const int token = first_ + thread;
    const bool owner = thread < kTile && token < owners_;
    const Range all = union_of_block(owner ? owner_range(token) : Range{0, 0, 0}, shared_.scratch);
    if (thread < kTile) {
      const int count = owner && p_.row_term ? keys_of_row(p_.visibility, batch_, token).count : 0;
      shared_.owners[thread] = read_row(row_head(head_), token, count);
    }
    for (int i = 0; i < p_.other_heads; ++i) {
      const int head = head_ * p_.other_heads + i;
      for (int other = all.begin / kTile * kTile; other < all.end; other += kTile)
        visit(head, other);
    }
    write();
  }

 private:
  const BackwardParams& p_;
  BackwardShared<Real>& shared_;
  const int owners_;
  const int others_;
  const int blocks_;
  const int64_t head_of_all_;
  const int batch_;
  const int head_;
  const int first_;
  const int slice_;
  const uint8_t* const owner_mask_;
  const uint8_t* const other_mask_;
  Real gradient_[kPer][kSlicePer] = {};
  Real row_sum_[kPer] = {};
  int dominant_[kPer] = {-1, -1, -1, -1};  ///< of the pair form's rows: the key with most of the probability

  /// Whether a row's G of the key with most of its probability follows from the others, as G_ii of a relation does.
  __device__ bool balances() const { return p_.dominant_keys != nullptr && p_.row_term != p_.column_term; }

  __device__ const uint8_t* mask_of(const uint8_t* mask, int count) const {
    return mask == nullptr ? nullptr : mask + static_cast<int64_t>(batch_) * count;
  }

  __device__ int64_t row_head(int head) const {
    return static_cast<int64_t>(batch_) * p_.heads * p_.other_heads + head;
  }

  __device__ static Real read(const void* from, bool wide, int64_t at) {
    return wide ? static_cast<Real>(static_cast<const double*>(from)[at])
                : static_cast<Real>(static_cast<const float*>(from)[at]);
  }

  __device__ RowValues<Real> read_row(int64_t head, int row, int count) const {
    if (count < 2) return {0, 0, 0, 0};
    constexpr Real kUnit = static_cast<Real>(B::kUnit);
    const int64_t at = head * p_.visibility.rows + row;
    const Real lse_teacher = read(p_.lse_teacher, p_.wide_statistics, at) * kUnit;
    return {lse_teacher, read(p_.lse_student, p_.wide_statistics, at) * kUnit - lse_teacher,
            read(p_.grad_kl, p_.wide_grad, at) * static_cast<Real>(p_.gradient_multiplier),
            p_.center == nullptr ? Real(0) : read(p_.center, p_.wide_statistics, at) * kUnit};
  }

  __device__ Range owner_range(int token) const {
    Range range = p_.row_term ? keys_of_row(p_.visibility, batch_, token) : Range{0, 0, 0};
    if (!p_.column_term) return range;
    const Range rows = rows_of_key(p_.visibility, batch_, token);
    if (rows.end <= rows.begin) return range;
    if (range.end <= range.begin) return rows;
    return {min(range.begin, rows.begin), max(range.end, rows.end), range.count};
  }

  /// G of one logit over the upstream gradient.
  __device__ Real logit_gradient(const RowValues<Real>& row, Real teacher, Real delta) const {
    const Real log_teacher = teacher - row.lse_teacher;
    const Real r = delta - row.lse_difference;
    if (p_.divergence == Divergence::kForwardKL) return probability_difference(log_teacher, r);
    const Real beta = static_cast<Real>(p_.beta);
    const Real q = student_probability(log_teacher, r);
    if (q == 0) return 0;
    const Real value = q * (student_value(p_.divergence, r, beta) - row.center) * B::kNats;
    return p_.divergence == Divergence::kJSD ? (1 - beta) * value : value;
  }

  __device__ void visit(int head, int other) {
    const int thread = static_cast<int>(threadIdx.x);
    if (p_.column_term && thread < kTile) {
      const Range keys = keys_of_row(p_.visibility, batch_, other + thread);
      shared_.others[thread] = read_row(row_head(head), other + thread, keys.count);
      shared_.other_keys[thread] = keys;
      shared_.dominant_keys[thread] = -1;
      if (balances() && other + thread < others_) {
        const int64_t at = row_head(head) * p_.visibility.rows + other + thread;
        shared_.dominant_keys[thread] = p_.dominant_keys[at];
        shared_.dominant_gradients[thread] = static_cast<Real>(p_.dominant_gradients[at]);
      }
    }
    Real teacher[kPer][kPer];
    Real delta[kPer][kPer];
    const Products<Real> products{
        side_of(p_.owner_student, p_.other_student, head, p_.student_multiplier, p_.scale_student),
        side_of(p_.owner_teacher, p_.other_teacher, head, p_.teacher_multiplier, p_.scale_teacher),
        p_.difference_ratios == nullptr ? p_.difference_ratio : p_.difference_ratios[row_head(head)], false};
    logits_of_tile(teacher, delta, shared_.staged, products, {first_, owners_, owner_mask_},
                   {other, others_, other_mask_});
    weigh(teacher, delta, other);
    __syncthreads();
    add_product(products.student, other);
  }

  __device__ Side<Real> side_of(
      const Vectors& owners, const Vectors& others, int head, double multiplier, double scale) const {
    return {owners,
            others,
            offset_of_head(owners, batch_, head),
            offset_of_head(others, batch_, head),
            static_cast<Real>(multiplier),
            static_cast<Real>(scale * B::kUnit)};
  }

  /// Log P, in logit units, of a key with more than 0.55 of a row: rounding does not find a second one.
  static constexpr Real kDominant = static_cast<Real>(-0.6 * B::kUnit);

  /// Writes H to shared memory.
  __device__ void weigh(const Real (&teacher)[kPer][kPer], const Real (&deltas)[kPer][kPer], int other) {
    const bool relation = p_.row_term && p_.column_term;
    const bool balances = this->balances();
    const int thread = anew(static_cast<int>(threadIdx.x));
    const int row = thread / 16 * kPer;
    const int column = thread % 16 * kPer;
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
      const int owner = first_ + row + a;
      const Range keys = p_.row_term ? keys_of_row(p_.visibility, batch_, owner) : Range{0, 0, 0};
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        const int token = other + column + b;
        const Real delta = deltas[a][b];
        Real h = 0;
        // The row's own key follows from the others.
        const bool counts = is_real(other_mask_, others_, 0, token) && is_real(owner_mask_, owners_, 0, owner) &&
                            !(relation && token == owner);
        if (p_.row_term && counts && token >= keys.begin && token < keys.end) {
          const RowValues<Real>& values = shared_.owners[row + a];
          if (balances && teacher[a][b] - values.lse_teacher > kDominant) {
            dominant_[a] = token;
          } else {
            h = values.weight * logit_gradient(values, teacher[a][b], delta);
            row_sum_[a] += h;
          }
        }
        if (p_.column_term && counts) {
          const Range& seen = shared_.other_keys[column + b];
          if (owner >= seen.begin && owner < seen.end) {
            const RowValues<Real>& values = shared_.others[column + b];
            h += shared_.dominant_keys[column + b] == owner
                     ? shared_.dominant_gradients[column + b]
                     : values.weight * logit_gradient(values, teacher[a][b], delta);
          }
        }
        shared_.h[column + b][row + a] = h;
      }
    }
  }

  /// gradient += H x the others' student vectors. A vector that is not finite has made H NaN in the rows that it
  /// touches; here it counts as 0, so that it reaches no others.
  __device__ void add_product(const Side<Real>& side, int other) {
    const int thread = anew(static_cast<int>(threadIdx.x));
    const int row = thread / 16 * kPer;
    const int lane = thread % 16;
    for (int part = 0; part < kTile; part += kDepth) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kDepth * kSlice; i += kThreads) {
        const int token = other + part + i / kSlice;
        const int d = slice_ + i % kSlice;
        Real x = 0;
        if (d < side.others.dim && is_real(other_mask_, others_, 0, token)) {
          x = read_element<Real>(side.others, side.other_offset + token * side.others.token_stride + d) *
              side.multiplier;
        }
        shared_.vectors[i / kSlice][i % kSlice] = isfinite(x) ? x : Real(0);
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        Real h[kPer];
#pragma unroll
        for (int a = 0; a < kPer; ++a)
          h[a] = shared_.h[part + k][row + a];
#pragma unroll
        for (int e = 0; e < kSlicePer; ++e) {
          const Real x = shared_.vectors[k][e * 16 + lane];
#pragma unroll
          for (int a = 0; a < kPer; ++a)
            gradient_[a][e] = fma(h[a], x, gradient_[a][e]);
        }
      }
    }
    __syncthreads();
  }

  __device__ void store(int64_t at, Real x) const {
    void* to = p_.gradient;
    switch (p_.owner_student.type) {
      case Scalar::kDouble:
        static_cast<double*>(to)[at] = x > 1.7976931348623157e308
                                           ? 1.7976931348623157e308
                                           : (x < -1.7976931348623157e308 ? -1.7976931348623157e308 : double(x));
        break;
      case Scalar::kFloat:
        static_cast<float*>(to)[at] = static_cast<float>(cut(x, 3.4028234663852886e38));
        break;
      case Scalar::kHalf:
        static_cast<__half*>(to)[at] = __float2half_rn(static_cast<float>(cut(x, 65504.0)));
        break;
      default:
        static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(static_cast<float>(cut(x, 3.3895313892515355e38)));
    }
  }
  __device__ static Real cut(Real x, double limit) {
    const Real l = static_cast<Real>(limit);
    return x > l ? l : (x < -l ? -l : x);
  }

  /// The key of row `token` whose G is `rest`, -1 where there is none; for the keys' gradient as well.
  __device__ int balanced_key(int a, int token, Real rest) const {
    if (!balances() || !p_.row_term) return -1;
    const int key = maximum_of_row(dominant_[a]);
    if (slice_ == 0 && threadIdx.x % 16 == 0 && token < owners_) {
      const int64_t at = head_of_all_ * owners_ + token;
      p_.dominant_keys[at] = key;
      p_.dominant_gradients[at] = rest;
    }
    return key;
  }

  __device__ void write() {
    const bool relation = p_.row_term && p_.column_term;
    const int64_t other_offset = offset_of_head(p_.other_student, batch_, head_);
    const int thread = anew(static_cast<int>(threadIdx.x));
    const int row = thread / 16 * kPer;
    const int lane = thread % 16;
    const int dim = p_.owner_student.dim;
    const int64_t own_offset = offset_of_head(p_.owner_student, batch_, head_ * p_.other_heads);
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
      const Real rest = -sum_of_row(row_sum_[a]);
      // G_ii is minus the sum of the row's others, and counts twice: as a row and as a key.
      const Real own = relation ? 2 * rest : Real(0);
      const int token = first_ + row + a;
      const int dominant = balanced_key(a, token, rest);
      if (token >= owners_) continue;
      const bool real = is_real(owner_mask_, owners_, 0, token);
#pragma unroll
      for (int e = 0; e < kSlicePer; ++e) {
        const int d = slice_ + e * 16 + lane;
        if (d >= dim) continue;
        Real x = gradient_[a][e];
        if (relation && real) {
          const Real element =
              read_element<Real>(p_.owner_student, own_offset + token * p_.owner_student.token_stride + d) *
              static_cast<Real>(p_.student_multiplier);
          x += own * (isfinite(element) ? element : Real(0));
        }
        if (dominant >= 0) {
          const Real element =
              read_element<Real>(p_.other_student, other_offset + dominant * p_.other_student.token_stride + d) *
              static_cast<Real>(p_.student_multiplier);
          x += rest * (isfinite(element) ? element : Real(0));
        }
        x = real ? x * static_cast<Real>(p_.output_scale) : Real(0);
        store((head_of_all_ * owners_ + token) * dim + d, x);
        if constexpr (sizeof(Real) == sizeof(float)) {
          const RowValues<Real>& values = shared_.owners[row + a];
          const bool held =
              fabs(x) < B::kHuge && fabs(values.lse_teacher) < B::kHuge && fabs(values.lse_difference) < B::kHuge;
          if (!held) mark_redo(p_.redo, head_of_all_, token, owners_);
        }
      }
    }
  }
};

/// @param blocks in all: a grid may have fewer, each of which walks over its share
/// @param repeat whether this is the second pass, over marked blocks
template <typename Real>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams params, int blocks, bool repeat) {
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  if (repeat && params.redo[0] == 0) return;
  auto& shared = *reinterpret_cast<BackwardShared<Real>*>(dynamic_shared_memory());
  // In shared memory: registers are what this kernel is short of.
  if (threadIdx.x == 0) shared.block = static_cast<int>(blockIdx.x);
  __syncthreads();
#pragma unroll 1
  while (shared.block < blocks) {
    if (!repeat || params.redo[1 + static_cast<int64_t>(shared.block)] != 0) {
      Backward<Real>(params, shared, anew(shared.block), anew(static_cast<int>(blockIdx.y))).run();
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.block += static_cast<int>(gridDim.x);
    __syncthreads();
  }
}

}  // namespace linearard::cuda::generic
