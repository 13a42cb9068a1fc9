#pragma once

#include "../common/instructions.cuh"
#include "tiles.cuh"

namespace linearard::cuda::generic {

/// Statistics and divergence of 64 rows. One sweep over the keys for the forward KL and the log-sum-exps; a second one,
/// with these known, for the Jensen-Shannon divergence and for the centers that the gradients of the others need.
template <typename Real>
class Forward {
  using B = Base<Real>;

 public:
  __device__ Forward(const ForwardParams& p, int64_t block)
      : p_(p),
        blocks_((p.visibility.rows + kTile - 1) / kTile),
        head_of_all_(block / blocks_),
        batch_(static_cast<int>(head_of_all_ / p.heads)),
        head_(static_cast<int>(head_of_all_ % p.heads)),
        first_(static_cast<int>(block % blocks_) * kTile),
        key_mask_(p.visibility.key_mask == nullptr
                      ? nullptr
                      : p.visibility.key_mask + static_cast<int64_t>(batch_) * p.visibility.keys) {}

  __device__ void run(Staged<Real>& staged, int* scratch) {
    const int thread = static_cast<int>(threadIdx.x);
    const Range all =
        union_of_block(thread < kTile ? keys_of_row(p_.visibility, batch_, first_ + thread) : Range{0, 0, 0}, scratch);
#pragma unroll
    for (int a = 0; a < kPer; ++a)
      ranges_[a] = keys_of_row(p_.visibility, batch_, first_ + thread / 16 * kPer + a);
    for (int other = all.begin / kTile * kTile; other < all.end; other += kTile) {
      compute(staged, other);
      add_tile(other);
    }
    finish_sums();
    if (p_.center || p_.divergence == Divergence::kJSD) {
      for (int other = all.begin / kTile * kTile; other < all.end; other += kTile) {
        compute(staged, other);
        add_values(other);
      }
    }
    write();
  }

 private:
  const ForwardParams& p_;
  const int blocks_;
  const int64_t head_of_all_;
  const int batch_;
  const int head_;
  const int first_;
  const uint8_t* const key_mask_;
  Range ranges_[kPer];
  RowSums<Real> sums_[kPer];
  Real lse_student_[kPer];  ///< in logit units
  Real lse_teacher_[kPer];
  Real values_[kPer] = {};
  Real probabilities_[kPer] = {};  ///< sums of Q, as computed, for centers
  Real teacher_[kPer][kPer];       ///< logits t
  Real delta_[kPer][kPer];         ///< s - t

  /// Read again for each tile: registers are scarcer.
  __device__ double difference_ratio() const {
    return p_.difference_ratios == nullptr ? p_.difference_ratio
                                           : p_.difference_ratios[anew(static_cast<int>(head_of_all_))];
  }

  __device__ void compute(Staged<Real>& staged, int other) {
    const Visibility& v = p_.visibility;
    const Products<Real> products{side_of(p_.student_rows, p_.student_keys, p_.student_multiplier, p_.scale_student),
                                  side_of(p_.teacher_rows, p_.teacher_keys, p_.teacher_multiplier, p_.scale_teacher),
                                  difference_ratio(), p_.teacher_only};
    logits_of_tile(teacher_, delta_, staged, products, {first_, v.rows, nullptr}, {other, v.keys, key_mask_});
  }

  __device__ Side<Real> side_of(const Vectors& rows, const Vectors& keys, double multiplier, double scale) const {
    return {rows,
            keys,
            offset_of_head(rows, batch_, head_),
            offset_of_head(keys, batch_, head_),
            static_cast<Real>(multiplier),
            static_cast<Real>(scale * B::kUnit)};
  }

  __device__ bool sees(int a, int b, int other) const {
    const int key = other + static_cast<int>(threadIdx.x) % 16 * kPer + b;
    return key >= ranges_[a].begin && key < ranges_[a].end && is_real(key_mask_, p_.visibility.keys, 0, key);
  }

  __device__ void add_tile(int other) {
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
      RowSums<Real>& sums = sums_[a];
      Real top_student = -INFINITY;
      Real top_teacher = -INFINITY;
      bool seen[kPer];
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        seen[b] = sees(a, b, other);
        if (!seen[b]) continue;
        top_student = fmax(top_student, teacher_[a][b] + delta_[a][b]);
        top_teacher = fmax(top_teacher, teacher_[a][b]);
      }
      sums.raise(maximum_of_row(top_teacher), maximum_of_row(top_student));
      const Real reference_student = RowSums<Real>::reference(sums.max_student);
      const Real reference_teacher = RowSums<Real>::reference(sums.max_teacher);
      Real x[kPer];
      Real exp_teacher[kPer];
      Real tile_sum = 0;
      Real tile_moment = 0;
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        exp_teacher[b] = seen[b] ? B::exp(teacher_[a][b] - reference_teacher) : Real(0);
        x[b] = seen[b] ? delta_[a][b] - sums.mean : Real(0);
        tile_sum += exp_teacher[b];
        tile_moment += exp_teacher[b] * x[b];
      }
      const Real shift = sums.recenter(sum_of_row(tile_sum), sum_of_row(tile_moment), threadIdx.x % 16 == 0);
      const Real factor = sums.student_factor();
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        const Real exp_student = seen[b] ? B::exp(teacher_[a][b] + delta_[a][b] - reference_student) : Real(0);
        sums.sum_student += exp_student;
        sums.sum_phi += RowSums<Real>::phi_term(exp_teacher[b], exp_student, x[b] - shift, factor);
      }
    }
  }

  __device__ void finish_sums() {
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
      RowSums<Real>& sums = sums_[a];
      sums.sum_student = sum_of_row(sums.sum_student);
      sums.sum_phi = sum_of_row(sums.sum_phi);
      lse_student_[a] = sums.max_student + B::log(sums.sum_student);
      lse_teacher_[a] = sums.max_teacher + B::log(sums.sum_teacher);
    }
  }

  __device__ void add_values(int other) {
    const Real beta = static_cast<Real>(p_.beta);
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
#pragma unroll
      for (int b = 0; b < kPer; ++b) {
        if (!sees(a, b, other)) continue;
        const Real log_teacher = teacher_[a][b] - lse_teacher_[a];
        const Real r = delta_[a][b] - (lse_student_[a] - lse_teacher_[a]);
        if (!p_.center) {
          values_[a] += jsd_term(log_teacher, r, beta);
        } else {
          const Real q = student_probability(log_teacher, r);
          if (q == 0) continue;
          values_[a] += q * student_value(p_.divergence, r, beta) * B::kNats;
          probabilities_[a] += q;
        }
      }
    }
  }

  __device__ Real value_of(int a) const {
    const Real value = sum_of_row(values_[a]);
    if (p_.center) {
      // The rounding of the log-sum-exps leaves sum_j Q_ij beside 1, which would shift the mean by as much of itself.
      const Real probability = sum_of_row(probabilities_[a]);
      return probability == 0 ? Real(0) : value / probability;
    }
    if (p_.divergence != Divergence::kJSD) return sums_[a].divergence();
    const Real beta = static_cast<Real>(p_.beta);
    const Real entropy = -beta * log(beta) - (1 - beta) * log1p(-beta);
    return value < 0 ? Real(0) : (value > entropy ? entropy : value);
  }

  __device__ void store(void* to, int64_t at, Real x) const {
    if (to == nullptr) return;
    if (p_.wide_outputs) {
      static_cast<double*>(to)[at] = x;
    } else {
      constexpr float kLargest = 3.4028234663852886e38f;
      static_cast<float*>(to)[at] = x > kLargest ? kLargest : (x < -kLargest ? -kLargest : static_cast<float>(x));
    }
  }

  __device__ void write() {
#pragma unroll
    for (int a = 0; a < kPer; ++a) {
      const Real value = value_of(a);
      const int row = first_ + static_cast<int>(threadIdx.x) / 16 * kPer + a;
      if (threadIdx.x % 16 != 0 || row >= p_.visibility.rows) continue;
      const bool any = ranges_[a].count > 0;
      const Real kl = ranges_[a].count > 1 && !p_.teacher_only ? value : Real(0);
      const Real lse_student = any && !p_.teacher_only ? lse_student_[a] * B::kNats : Real(0);
      const Real lse_teacher = any ? lse_teacher_[a] * B::kNats : Real(0);
      const int64_t at = head_of_all_ * p_.visibility.rows + row;
      store(p_.kl, at, kl);
      store(p_.lse_student, at, lse_student);
      store(p_.lse_teacher, at, lse_teacher);
      if constexpr (sizeof(Real) == sizeof(float)) {
        const bool held = fabs(kl) < B::kHuge && fabs(lse_student) < B::kHuge && fabs(lse_teacher) < B::kHuge;
        if (!held) mark_redo(p_.redo, head_of_all_, row, p_.visibility.rows);
      }
    }
  }
};

/// @param blocks in all: a grid may have fewer, each of which walks over its share
/// @param repeat whether this is the second pass, over marked blocks; @param all_blocks once one block is marked, all
template <typename Real>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams params, int blocks, bool repeat, bool all_blocks) {
  __shared__ Staged<Real> staged;
  __shared__ int scratch[2];
  __shared__ int current;  // not in a register, which are scarcer
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  if ((repeat || all_blocks) && params.redo[0] == 0) return;
  if (threadIdx.x == 0) current = static_cast<int>(blockIdx.x);
  __syncthreads();
#pragma unroll 1
  while (current < blocks) {
    if (!repeat || params.redo[1 + current] != 0) Forward<Real>(params, current).run(staged, scratch);
    __syncthreads();
    if (threadIdx.x == 0) current += static_cast<int>(gridDim.x);
    __syncthreads();
  }
}

}  // namespace linearard::cuda::generic
