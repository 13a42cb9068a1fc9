#pragma once

#include "../common/device_math.cuh"
#include "../common/half_range.cuh"
#include "../common/rounding.cuh"
#include "tiles.cuh"

namespace linearard::cuda::mma {

/// What G needs of the row that a probability belongs to; zeros for a row without divergence.
struct alignas(16) RowValues {
  float lse_teacher;     ///< in logit units
  float lse_difference;  ///< lse_student - lse_teacher
  float weight;          ///< upstream gradient
  float unused;
};

/// Gradient of kOwners tokens for the forward KL: H = G as rows + G^T as keys in float registers, rounded only to feed
/// the last product. Every owner belongs to one warp: no atomics, the same bits in every run.
template <typename T, int kDim, int kSlabs>
class Backward {
  using S = Shape<kDim, kSlabs>;
  using Logits = float[kSlabs][kColumnGroups][4];
  static constexpr int kRowsOfThread = 2 * kSlabs;

 public:
  static constexpr int kOwners = S::kOwners;
  // After the vectors: values of the owners as rows, of the others as rows for each stage, and the keys that these see.
  static constexpr int kOtherValues = S::kColumns + kOwners * static_cast<int>(sizeof(RowValues));
  static constexpr int kOtherKeys = kOtherValues + kStages * kOthers * static_cast<int>(sizeof(RowValues));
  static constexpr int kSharedBytes = kOtherKeys + kStages * kOthers * static_cast<int>(sizeof(int2));

  __device__ static void run(const BackwardParams& p, char* shared) {
    const int owners = owner_count(p);
    const int blocks = (owners + kOwners - 1) / kOwners;
    const int64_t problem = blockIdx.x / blocks;
    const int block = static_cast<int>(blockIdx.x % blocks);
    if (p.only_heads != nullptr && p.only_heads[problem] == 0) return;
    Backward(p, shared, static_cast<int>(problem / p.heads), static_cast<int>(problem % p.heads), block * kOwners)
        .run_block();
  }

  __host__ __device__ static int owner_count(const BackwardParams& p) {
    return p.row_term ? p.visibility.rows : p.visibility.keys;
  }

 private:
  const BackwardParams& p_;
  const uint32_t shared_;
  char* const memory_;  ///< the same as a pointer
  const int batch_;
  const int head_;  ///< of the gradient
  const int first_;
  float grad_scale_ = 1;  ///< power of two that keeps H inside the range of half
  float gradient_[kSlabs][kDim / 8][4] = {};
  float row_sum_[kRowsOfThread] = {};  ///< of G over the row's other keys

  __device__ Backward(const BackwardParams& p, char* shared, int batch, int head, int first)
      : p_(p), shared_(shared_address(shared)), memory_(shared), batch_(batch), head_(head), first_(first) {
    grad_scale_ = half_range_scale(p.largest_grad);
  }

  // Read from the parameters each time: registers are what this kernel is short of.
  __device__ RowValues* owner_values() const { return reinterpret_cast<RowValues*>(memory_ + S::kColumns); }
  __device__ RowValues* other_values() const { return reinterpret_cast<RowValues*>(memory_ + kOtherValues); }
  /// Begin and end of the keys that the others see.
  __device__ int2* other_keys() const { return reinterpret_cast<int2*>(memory_ + kOtherKeys); }
  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16 * kSlabs; }
  __device__ int owners() const { return owner_count(p_); }
  __device__ int others() const { return p_.row_term ? p_.visibility.keys : p_.visibility.rows; }
  __device__ const uint8_t* mask_of(const uint8_t* mask, int count) const {
    return mask == nullptr ? nullptr : mask + static_cast<int64_t>(batch_) * count;
  }
  __device__ const uint8_t* owner_mask() const {
    return mask_of(p_.row_term ? p_.visibility.row_mask : p_.visibility.key_mask, owners());
  }
  __device__ const uint8_t* other_mask() const {
    return mask_of(p_.row_term ? p_.visibility.key_mask : p_.visibility.row_mask, others());
  }

  __device__ int row_in_block(int r) const { return warp_row() + (r / 2) * 16 + row_in_slab(r % 2); }

  __device__ RowValues read_row(int64_t row_head, int row, int count) const {
    if (count < 2) return {0, 0, 0, 0};
    const int64_t at = row_head * p_.visibility.rows + row;
    const float lse_teacher = static_cast<const float*>(p_.lse_teacher)[at] * kLog2E;
    const float lse_student = static_cast<const float*>(p_.lse_student)[at] * kLog2E;
    return {lse_teacher, lse_student - lse_teacher, static_cast<const float*>(p_.grad_kl)[at] * grad_scale_, 0};
  }

  __device__ Range owner_range(int token) const {
    const Visibility& v = p_.visibility;
    Range range = p_.row_term ? keys_of_row(v, batch_, token) : Range{0, 0, 0};
    if (!p_.column_term) return range;
    const Range rows = rows_of_key(v, batch_, token);
    if (rows.end <= rows.begin) return range;
    if (range.end <= range.begin) return rows;
    return {min(range.begin, rows.begin), max(range.end, rows.end), range.count};
  }

  __device__ void load_others(int other_head, int tile, int stage) const {
    const uint32_t base = shared_ + S::kOther + stage * 2 * S::kOtherBytes;
    const int first = tile * kOthers;
    load_tokens<T, kDim, kOthers>(base, head_of<T>(p_.other_student, batch_, other_head), p_.other_student, first,
                                  others(), other_mask());
    load_tokens<T, kDim, kOthers>(base + S::kOtherBytes, head_of<T>(p_.other_teacher, batch_, other_head),
                                  p_.other_teacher, first, others(), other_mask());
    copy_commit();
    if (p_.column_term && threadIdx.x < kOthers) {
      const int row = first + static_cast<int>(threadIdx.x);
      const Range range = keys_of_row(p_.visibility, batch_, row);
      other_values()[stage * kOthers + threadIdx.x] = read_row(row_head(other_head), row, range.count);
      other_keys()[stage * kOthers + threadIdx.x] = make_int2(range.begin, range.end);
    }
  }

  /// Index of a head of the rows over all batch entries.
  __device__ int64_t row_head(int head) const {
    return static_cast<int64_t>(batch_) * p_.heads * p_.other_heads + head;
  }

  __device__ void run_block() {
    const int thread = static_cast<int>(threadIdx.x);
    const int token = first_ + thread;
    const bool owner = thread < kOwners && token < owners();
    const Range all =
        union_of_block(owner ? owner_range(token) : Range{0, 0, 0}, reinterpret_cast<int*>(other_values()));
    if (thread < kOwners) {
      const int count = owner && p_.row_term ? keys_of_row(p_.visibility, batch_, token).count : 0;
      owner_values()[thread] = read_row(row_head(head_), token, count);
    }
    const int begin = all.begin / kOthers;
    const int end = (all.end + kOthers - 1) / kOthers;

    // An owner shared by several heads of rows sums over all of them.
    const int first_head = head_ * p_.other_heads;
    load_tokens<T, kDim, kOwners>(shared_, head_of<T>(p_.owner_student, batch_, first_head), p_.owner_student, first_,
                                  owners(), nullptr);
    load_tokens<T, kDim, kOwners>(shared_ + S::kOwnerTeacher, head_of<T>(p_.owner_teacher, batch_, first_head),
                                  p_.owner_teacher, first_, owners(), nullptr);
    if (begin < end) load_others(first_head, begin, 0);
#pragma unroll 1
    for (int i = 0; i < p_.other_heads; ++i) {
#pragma unroll 1
      for (int tile = begin; tile < end; ++tile) {
        const int stage = (i * (end - begin) + tile - begin) % kStages;
        if (tile + 1 < end) {
          load_others(first_head + i, tile + 1, stage ^ 1);
          copy_wait<1>();
        } else if (i + 1 < p_.other_heads) {
          load_others(first_head + i + 1, begin, stage ^ 1);
          copy_wait<1>();
        } else {
          copy_wait<0>();
        }
        __syncthreads();
        visit(tile, stage);
        __syncthreads();
      }
    }
    copy_wait<0>();
    __syncthreads();
    write();
  }

  __device__ bool all_rows_see(int tile) const {
    const Visibility& v = p_.visibility;
    const int last = (tile + 1) * kOthers - 1;
    if (v.row_ranges != nullptr || last >= others()) return false;
    return !v.causal || last <= first_ + v.keys - v.rows;
  }

  __device__ bool all_columns_see(int tile) const {
    const Visibility& v = p_.visibility;
    const int first = tile * kOthers;
    if (v.row_ranges != nullptr || first + kOthers > others()) return false;
    return !v.causal || first_ + kOwners - 1 <= first + v.keys - v.rows;
  }

  __device__ void visit(int tile, int stage) {
    const uint32_t vectors = shared_ + S::kOther + stage * 2 * S::kOtherBytes;
    Logits student = {};
    Logits teacher = {};
    multiply_tile<T, kDim, kSlabs, 2>(teacher, shared_ + S::kOwnerTeacher, vectors + S::kOtherBytes, warp_row());
    multiply_tile<T, kDim, kSlabs, 2>(student, shared_, vectors, warp_row());
    weigh(student, teacher, tile, stage);
    add_product(student, vectors);
  }

  /// The terms that a tile's elements have: both, one, or whatever their bits say.
  enum class Kind { kBoth, kRows, kColumns, kBits };

  /// Which elements count. The kind is the same for the whole block; bits: the owner as a row, the other as a row.
  struct Terms {
    Kind kind;
    uint32_t rows;
    uint32_t columns;
  };

  __device__ Terms terms_of(int tile, int stage) const {
    const Visibility& v = p_.visibility;
    const bool relation = p_.row_term && p_.column_term;
    const int first = tile * kOthers;
    // Causal: a tile on one side of the diagonal has one of the two terms. In the pair form the diagonal of a packed
    // sequence may lie anywhere.
    const bool halves = relation && v.causal;
    const bool rows_see = p_.row_term && (!halves || first <= first_ + kOwners - 1);
    const bool columns_see = p_.column_term && (!halves || first_ <= first + kOthers - 1);
    const bool diagonal = relation && first < first_ + kOwners && first + kOthers > first_;
    if (!diagonal && (rows_see || columns_see) && (!rows_see || all_rows_see(tile)) &&
        (!columns_see || all_columns_see(tile))) {
      return {rows_see && columns_see ? Kind::kBoth : (rows_see ? Kind::kRows : Kind::kColumns), 0, 0};
    }
    Terms terms{Kind::kBits, 0, 0};
#pragma unroll 1
    for (int bit = 0; bit < 16 * kSlabs; ++bit) {
      const int c = bit % 4;
      const int column = column_of(bit / 4 % kColumnGroups, c);
      const int other = first + column;
      const int owner = first_ + row_in_block(bit / (4 * kColumnGroups) * 2 + c / 2);
      // The row's own key follows from the others.
      if (!is_real(other_mask(), others(), 0, other) || (relation && owner == other)) continue;
      if (rows_see) {
        const Range range = keys_of_row(v, batch_, owner);
        if (other >= range.begin && other < range.end) terms.rows |= 1u << bit;
      }
      if (columns_see) {
        const int2 keys = other_keys()[stage * kOthers + column];
        if (owner >= keys.x && owner < keys.y) terms.columns |= 1u << bit;
      }
    }
    return terms;
  }

  /// Writes H over the student's logits.
  __device__ void weigh(Logits& student, Logits& teacher, int tile, int stage) {
    const Terms terms = terms_of(tile, stage);
    switch (terms.kind) {
      case Kind::kBoth:
        weigh_tile<Kind::kBoth>(student, teacher, terms, stage);
        break;
      case Kind::kRows:
        weigh_tile<Kind::kRows>(student, teacher, terms, stage);
        break;
      case Kind::kColumns:
        weigh_tile<Kind::kColumns>(student, teacher, terms, stage);
        break;
      default:
        weigh_tile<Kind::kBits>(student, teacher, terms, stage);
    }
  }

  template <Kind kKind>
  __device__ void weigh_tile(Logits& student, Logits& teacher, const Terms& terms, int stage) {
    constexpr bool kRowTerm = kKind != Kind::kColumns;
    constexpr bool kColumnTerm = kKind != Kind::kRows;
    const LogitScales scales(p_.scale_student, p_.scale_teacher);
#pragma unroll
    for (int n = 0; n < kColumnGroups; ++n) {
      RowValues columns[2];
      if constexpr (kColumnTerm) {
        columns[0] = other_values()[stage * kOthers + column_of(n, 0)];
        columns[1] = other_values()[stage * kOthers + column_of(n, 1)];
      }
      float largest = 0;
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float delta = scales.difference(student[m][n][c], teacher[m][n][c]);
          student[m][n][c] = delta;
          teacher[m][n][c] = scales.logit(teacher[m][n][c]);
          if constexpr (kRowTerm) {
            largest = fmaxf(largest, fabsf(delta - owner_values()[row_in_block(2 * m + c / 2)].lse_difference));
          }
          if constexpr (kColumnTerm) largest = fmaxf(largest, fabsf(delta - columns[c % 2].lse_difference));
        }
      }
      // Near convergence a short polynomial serves, and the exponential unit rests.
      if (kKind != Kind::kBits && __all_sync(0xffffffffu, largest < Base<float>::kSeries)) {
        weigh_group<kKind, true>(student, teacher, n, terms, columns);
      } else {
        weigh_group<kKind, false>(student, teacher, n, terms, columns);
      }
    }
  }

  template <Kind kKind, bool kNear>
  __device__ void weigh_group(
      Logits& student, const Logits& teacher, int n, const Terms& terms, const RowValues (&columns)[2]) {
    const auto difference = [](float log_teacher, float r) {
      return kNear ? near_probability_difference(log_teacher, r) : probability_difference(log_teacher, r);
    };
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float t = teacher[m][n][c];
        const float delta = student[m][n][c];
        float h = 0;
        if (kKind == Kind::kBits ? (terms.rows >> bit_of(m, n, c) & 1u) != 0 : kKind != Kind::kColumns) {
          const RowValues row = owner_values()[row_in_block(2 * m + c / 2)];
          h = row.weight * difference(t - row.lse_teacher, delta - row.lse_difference);
          row_sum_[2 * m + c / 2] += h;
        }
        if (kKind == Kind::kBits ? (terms.columns >> bit_of(m, n, c) & 1u) != 0 : kKind != Kind::kRows) {
          const RowValues& column = columns[c % 2];
          h += column.weight * difference(t - column.lse_teacher, delta - column.lse_difference);
        }
        student[m][n][c] = h;
      }
    }
  }

  /// gradient += H x the others' student vectors.
  __device__ void add_product(const Logits& h, uint32_t others) {
    using Rows = Layout<kDim>;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t address = others + Rows::offset(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kOthers / 16; ++k) {
      uint32_t a[kSlabs][4];
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
        a[m][0] = pack<T>(h[m][2 * k][0], h[m][2 * k][1]);
        a[m][1] = pack<T>(h[m][2 * k][2], h[m][2 * k][3]);
        a[m][2] = pack<T>(h[m][2 * k + 1][0], h[m][2 * k + 1][1]);
        a[m][3] = pack<T>(h[m][2 * k + 1][2], h[m][2 * k + 1][3]);
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, Rows::advance(address, d / 2) + k * 16 * Rows::kRowBytes);
#pragma unroll
        for (int m = 0; m < kSlabs; ++m) {
          multiply_add<T>(gradient_[m][d], a[m], b[0], b[1]);
          multiply_add<T>(gradient_[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ float owner_element(int row, int d) const {
    using Rows = Layout<kDim>;
    const uint16_t bits = load_shared_16(shared_ + Rows::offset(row, d / 8) + d % 8 * 2);
    return static_cast<float>(*reinterpret_cast<const T*>(&bits));
  }

  __device__ void write() {
    const bool relation = p_.row_term && p_.column_term;
    const int dim = p_.owner_student.dim;
    const float scale = static_cast<float>(p_.output_scale) / grad_scale_;
    const int64_t head = static_cast<int64_t>(batch_) * p_.heads + head_;
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      // G_ii is minus the sum of the row's others, and counts twice: as a row and as a key.
      const float own = relation ? -2.f * sum_of_row(row_sum_[r]) : 0.f;
      const int token = first_ + row_in_block(r);
      if (token >= owners()) continue;
      const bool real = is_real(owner_mask(), owners(), 0, token);
      T* out = static_cast<T*>(p_.gradient) + (head * owners() + token) * dim;
      bool finite = true;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int d = column_of(n, c);
          if (d >= dim) continue;
          float x = gradient_[r / 2][n][2 * (r % 2) + c];
          if (relation) x += own * owner_element(row_in_block(r), d);
          x = real ? x * scale : 0.f;
          finite = finite && fabsf(x) < Base<float>::kHuge;
          out[d] = saturated_to<T>(x);
        }
      }
      const RowValues& row = owner_values()[row_in_block(r)];
      if (!finite || !(fabsf(row.lse_teacher) + fabsf(row.lse_difference) < Base<float>::kHuge)) {
        mark_redo(p_.redo, head, token, owners());
      }
    }
  }
};

template <typename T, int kDim, int kSlabs>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ BackwardParams params) {
  let_next_kernel_begin();
  wait_for_kernels_ahead();
  Backward<T, kDim, kSlabs>::run(params, dynamic_shared_memory());
}

}  // namespace linearard::cuda::mma
