#pragma once

#include "../common/device_math.cuh"
#include "tiles.cuh"

namespace linearard::cuda::mma {

/// Statistics and forward KL of kOwners rows: every row belongs to one warp, no sum depends on an order of blocks.
template <typename T, int kDim, int kSlabs>
class Forward {
  using S = Shape<kDim, kSlabs>;
  using Logits = float[kSlabs][kColumnGroups][4];
  static constexpr int kRowsOfThread = 2 * kSlabs;

 public:
  static constexpr int kOwners = S::kOwners;
  /// After the vectors: the block's range of keys.
  static constexpr int kSharedBytes = S::kColumns + 16;

  /// All blocks of rows in a grid of as many; or the listed ones, which are few as a rule, in any grid.
  __device__ static void run(const ForwardParams& p, char* shared) {
    const int blocks = (p.visibility.rows + kOwners - 1) / kOwners;
    if (p.row_counts == nullptr) {
      const int64_t problem = blockIdx.x / blocks;
      // Causal rows see more keys the later they come: the long blocks start first.
      run_one(p, shared, problem, blocks - 1 - static_cast<int>(blockIdx.x % blocks));
      return;
    }
    if (!is_any(p.row_counts, p.batch * p.heads)) return;
    const int64_t count = static_cast<int64_t>(blocks) * p.batch * p.heads;
#pragma unroll 1
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
      const int64_t problem = i / blocks;
      const int block = static_cast<int>(i % blocks);
      if (block * kOwners >= p.row_counts[problem]) continue;
      run_one(p, shared, problem, block);
      leave_shared_memory();
    }
  }

 private:
  const ForwardParams& p_;
  const uint32_t shared_;
  int* const scratch_;
  const int batch_;
  const int head_;
  const int first_;
  const int* const list_;  ///< rows of the head; null: all
  const int count_;        ///< of rows
  const int warp_row_;
  const uint8_t* const key_mask_;
  Range ranges_[kRowsOfThread];
  RowSums<float> sums_[kRowsOfThread];

  __device__ Forward(const ForwardParams& p, char* shared, int batch, int head, int first)
      : p_(p),
        shared_(shared_address(shared)),
        scratch_(reinterpret_cast<int*>(shared + S::kColumns)),
        batch_(batch),
        head_(head),
        first_(first),
        list_(p.row_lists == nullptr ? nullptr : p.row_lists + head_index(p, batch, head) * p.visibility.rows),
        count_(p.row_counts == nullptr ? p.visibility.rows : p.row_counts[head_index(p, batch, head)]),
        warp_row_(static_cast<int>(threadIdx.x) / 32 * 16 * kSlabs),
        key_mask_(p.visibility.key_mask == nullptr
                      ? nullptr
                      : p.visibility.key_mask + static_cast<int64_t>(batch) * p.visibility.keys) {}

  __device__ static void run_one(const ForwardParams& p, char* shared, int64_t problem, int block) {
    Forward(p, shared, static_cast<int>(problem / p.heads), static_cast<int>(problem % p.heads), block * kOwners)
        .run_block();
  }

  __device__ static int64_t head_index(const ForwardParams& p, int batch, int head) {
    return static_cast<int64_t>(batch) * p.heads + head;
  }

  /// The row in a place of the block; p_.visibility.rows if there is none.
  __device__ int row_at(int place) const {
    if (first_ + place >= count_) return p_.visibility.rows;
    return list_ != nullptr ? list_[first_ + place] : first_ + place;
  }
  __device__ int row_of(int r) const { return row_at(warp_row_ + (r / 2) * 16 + row_in_slab(r % 2)); }

  __device__ void load_keys(int tile, int stage) const {
    const uint32_t base = shared_ + S::kOther + stage * 2 * S::kOtherBytes;
    const int first = tile * kOthers;
    if (!p_.teacher_only) {
      load_tokens<T, kDim, kOthers>(base, head_of<T>(p_.student_keys, batch_, head_), p_.student_keys, first,
                                    p_.visibility.keys, key_mask_);
    }
    load_tokens<T, kDim, kOthers>(base + S::kOtherBytes, head_of<T>(p_.teacher_keys, batch_, head_), p_.teacher_keys,
                                  first, p_.visibility.keys, key_mask_);
    copy_commit();
  }

  __device__ void run_block() {
    const Visibility& v = p_.visibility;
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r)
      ranges_[r] = keys_of_row(v, batch_, row_of(r));
    const Range mine = static_cast<int>(threadIdx.x) < kOwners
                           ? keys_of_row(v, batch_, row_at(static_cast<int>(threadIdx.x)))
                           : Range{0, 0, 0};
    const Range all = union_of_block(mine, scratch_);
    const int begin = all.begin / kOthers;
    const int end = (all.end + kOthers - 1) / kOthers;

    if (!p_.teacher_only) {
      load_tokens<T, kDim, kOwners>(shared_, head_of<T>(p_.student_rows, batch_, head_), p_.student_rows, first_,
                                    count_, nullptr, list_);
    }
    load_tokens<T, kDim, kOwners>(shared_ + S::kOwnerTeacher, head_of<T>(p_.teacher_rows, batch_, head_),
                                  p_.teacher_rows, first_, count_, nullptr, list_);
    if (begin < end) load_keys(begin, begin % kStages);
    for (int tile = begin; tile < end; ++tile) {
      if (tile + 1 < end) {
        load_keys(tile + 1, (tile + 1) % kStages);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      visit(tile);
      __syncthreads();
    }
    write();
  }

  /// Whether all rows of the block see all keys of the tile.
  __device__ bool is_full(int tile) const {
    const Visibility& v = p_.visibility;
    const int last = (tile + 1) * kOthers - 1;
    if (v.row_ranges != nullptr || last >= v.keys) return false;
    return !v.causal || (list_ == nullptr && last <= first_ + v.keys - v.rows);
  }

  __device__ uint32_t visible_elements(int tile) const {
    uint32_t visible = 0;
#pragma unroll
    for (int n = 0; n < kColumnGroups; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int key = tile * kOthers + column_of(n, c);
        const bool real = key < p_.visibility.keys && (key_mask_ == nullptr || key_mask_[key] != 0);
#pragma unroll
        for (int m = 0; m < kSlabs; ++m) {
          const Range& range = ranges_[2 * m + c / 2];
          if (real && key >= range.begin && key < range.end) visible |= 1u << bit_of(m, n, c);
        }
      }
    }
    return visible;
  }

  __device__ void visit(int tile) {
    const uint32_t others = shared_ + S::kOther + (tile % kStages) * 2 * S::kOtherBytes;
    Logits student = {};
    Logits teacher = {};
    multiply_tile<T, kDim, kSlabs>(teacher, shared_ + S::kOwnerTeacher, others + S::kOtherBytes, warp_row_);
    if (!p_.teacher_only) multiply_tile<T, kDim, kSlabs>(student, shared_, others, warp_row_);

    const LogitScales scales(p_.scale_student, p_.scale_teacher);
    if (is_full(tile)) {
      add_rows<true>(student, teacher, ~0u, scales);
    } else {
      add_rows<false>(student, teacher, visible_elements(tile), scales);
    }
  }

  template <bool kAll>
  __device__ void add_rows(const Logits& student, const Logits& teacher, uint32_t visible, const LogitScales& scales) {
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        add_row<kAll>(sums_[2 * m + half], student[m], teacher[m], visible, m, half, scales);
      }
    }
  }

  /// One row's elements of a tile into its sums; all of them, or those that are visible.
  template <bool kAll>
  __device__ static void add_row(RowSums<float>& sums,
                                 const float (&student)[kColumnGroups][4],
                                 const float (&teacher)[kColumnGroups][4],
                                 uint32_t visible,
                                 int m,
                                 int half,
                                 const LogitScales& scales) {
    constexpr int kElements = 2 * kColumnGroups;
    float s[kElements];
    float t[kElements];
    float ratio[kElements];
    float top_student = -INFINITY;
    float top_teacher = -INFINITY;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int n = e / 2;
      const int c = 2 * half + e % 2;
      t[e] = scales.logit(teacher[n][c]);
      ratio[e] = scales.difference(student[n][c], teacher[n][c]);
      s[e] = t[e] + ratio[e];
      if (kAll || (visible >> bit_of(m, n, c) & 1u) != 0) {
        top_student = fmaxf(top_student, s[e]);
        top_teacher = fmaxf(top_teacher, t[e]);
      }
    }
    sums.raise(maximum_of_row(top_teacher), maximum_of_row(top_student));

    const float reference_student = RowSums<float>::reference(sums.max_student);
    const float reference_teacher = RowSums<float>::reference(sums.max_teacher);
    float tile_sum = 0;
    float tile_moment = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const bool seen = kAll || (visible >> bit_of(m, e / 2, 2 * half + e % 2) & 1u) != 0;
      const float x = ratio[e] - sums.mean;
      s[e] = seen ? Base<float>::exp(s[e] - reference_student) : 0.f;
      t[e] = seen ? Base<float>::exp(t[e] - reference_teacher) : 0.f;
      ratio[e] = seen ? x : 0.f;
      tile_sum += t[e];
      tile_moment += t[e] * ratio[e];
    }
    const float shift = sums.recenter(sum_of_row(tile_sum), sum_of_row(tile_moment), threadIdx.x % 4 == 0);
    bool near = true;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      ratio[e] -= shift;
      near = near && fabsf(ratio[e]) < Base<float>::kSeries;
      sums.sum_student += s[e];
    }
    if (__all_sync(0xffffffffu, near)) {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        sums.sum_phi += RowSums<float>::near_term(t[e], ratio[e]);
    } else {
      const float factor = sums.student_factor();
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        sums.sum_phi += RowSums<float>::phi_term(t[e], s[e], ratio[e], factor);
    }
  }

  __device__ void write() {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      RowSums<float>& sums = sums_[r];
      sums.sum_student = sum_of_row(sums.sum_student);
      sums.sum_phi = sum_of_row(sums.sum_phi);
      const int row = row_of(r);
      if (threadIdx.x % 4 != 0 || row >= p_.visibility.rows) continue;
      const bool sees = ranges_[r].count > 0;
      const float lse_teacher = sees ? sums.lse_teacher() : 0.f;
      const float lse_student = sees && !p_.teacher_only ? sums.lse_student() : 0.f;
      const float kl = ranges_[r].count > 1 && !p_.teacher_only ? sums.divergence() : 0.f;
      const int64_t head = head_index(p_, batch_, head_);
      const int64_t at = head * p_.visibility.rows + row;
      static_cast<float*>(p_.lse_teacher)[at] = lse_teacher;
      if (!p_.teacher_only) {
        static_cast<float*>(p_.lse_student)[at] = lse_student;
        static_cast<float*>(p_.kl)[at] = kl;
      }
      const float largest = fmaxf(fmaxf(fabsf(lse_teacher), fabsf(lse_student)), fabsf(kl));
      const float sum = lse_teacher + lse_student + kl;  // NaN or infinite if one of them is
      if (!(largest < Base<float>::kHuge) || !(fabsf(sum) < INFINITY)) {
        mark_redo(p_.redo, head, row, p_.visibility.rows);
      }
    }
  }
};

template <typename T, int kDim, int kSlabs>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ ForwardParams params) {
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  Forward<T, kDim, kSlabs>::run(params, dynamic_shared_memory());
}

}  // namespace linearard::cuda::mma
