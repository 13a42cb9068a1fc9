#pragma once

#include "elements.cuh"
#include "loader.cuh"
#include "order.cuh"

namespace linearard::cuda::triangular {

/// The sums of kOwners rows over the other tokens, and, in the triangular traversal, those of the columns that they
/// meet. Tiles on the diagonal are visited as a square, for their rows only, without the diagonal itself.
template <typename T, int kDim, int kSlabs>
class Forward {
  using S = mma::Shape<kDim, kSlabs>;
  using Products = float[kSlabs][kChunkGroups][4];
  static constexpr int kTile = mma::kOthers;
  static constexpr int kStages = mma::kStages;
  static_assert(kTile == kChunkColumns);

 public:
  static constexpr int kOwners = S::kOwners;
  // After the vectors: the values of a tile's columns for each stage, and each warp's sums of the columns.
  static constexpr int kPartial = S::kColumns + kStages * kTile * static_cast<int>(sizeof(ForwardToken));
  static constexpr int kSharedBytes = kPartial + mma::kWarps * kSums * kTile * static_cast<int>(sizeof(float));

  __device__ static void run(const TriangularForwardParams& p, char* shared) {
    const int blocks = (p.tokens + kOwners - 1) / kOwners;
    const auto [problem, index] = BlockOrder::of_block(static_cast<int>(blockIdx.x), blocks, p.batch * p.heads);
    if (p.wide_heads[problem] != 0) return;
    // The first block of rows sees most tiles, or, causal, the last one.
    Forward(p, shared, problem, (p.causal ? blocks - 1 - index : index) * kOwners).run_block();
  }

 private:
  const TriangularForwardParams& p_;
  const uint32_t shared_;
  char* const memory_;
  const int problem_;
  const int first_;
  const ElementFactors factors_;
  const TileLoader<T, kDim, kTile> student_;
  const TileLoader<T, kDim, kTile> teacher_;
  ForwardToken rows_[kSlabs][2];
  Sums sums_[kSlabs][2];

  __device__ Forward(const TriangularForwardParams& p, char* shared, int problem, int first)
      : p_(p),
        shared_(shared_address(shared)),
        memory_(shared),
        problem_(problem),
        first_(first),
        factors_(p.factors),
        student_(loader<kTile>(p.student)),
        teacher_(loader<kTile>(p.teacher)) {}

  template <int kRows>
  __device__ TileLoader<T, kDim, kRows> loader(const Vectors& vectors) const {
    const int batch = problem_ / p_.heads;
    const uint8_t* mask = p_.mask == nullptr ? nullptr : p_.mask + static_cast<int64_t>(batch) * p_.tokens;
    return {vectors, batch, problem_ % p_.heads, p_.tokens, mask, static_cast<int>(threadIdx.x)};
  }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int warp_row() { return warp() * 16 * kSlabs; }
  __device__ int row_of(int m, int half) const { return first_ + warp_row() + m * 16 + mma::row_in_slab(half); }
  __device__ const ForwardToken* values() const { return p_.token_values + static_cast<int64_t>(problem_) * p_.tokens; }
  __device__ ForwardToken* columns(int stage) const {
    return reinterpret_cast<ForwardToken*>(memory_ + S::kColumns) + stage * kTile;
  }
  __device__ float* partial(int warp) const {
    return reinterpret_cast<float*>(memory_ + kPartial) + warp * kSums * kTile;
  }

  __device__ void load_columns(int tile) const {
    const int stage = tile % kStages;
    const uint32_t base = shared_ + S::kOther + stage * 2 * S::kOtherBytes;
    student_.load(base, tile * kTile);
    teacher_.load(base + S::kOtherBytes, tile * kTile);
    if (threadIdx.x < kTile) {
      const int token = tile * kTile + static_cast<int>(threadIdx.x);
      const bool valid = token < p_.tokens;
      copy_async_8(shared_address(columns(stage) + threadIdx.x), values() + (valid ? token : 0), valid);
    }
    copy_commit();
  }

  __device__ void run_block() {
    loader<kOwners>(p_.student).load(shared_, first_);
    loader<kOwners>(p_.teacher).load(shared_ + S::kOwnerTeacher, first_);
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(m, half);
        rows_[m][half] = row < p_.tokens ? values()[row] : ForwardToken{0, 0};
      }
    }
    const int tiles = (p_.tokens + kTile - 1) / kTile;
    const int diagonal = first_ / kTile;
    const int below = min(diagonal + kOwners / kTile, tiles);
    const bool triangular = !p_.causal && p_.traversal == Traversal::kTriangular;
    const int begin = triangular ? diagonal : 0;
    const int end = p_.causal ? below : tiles;
    load_columns(begin);
    for (int tile = begin; tile < end; ++tile) {
      if (tile + 1 < end) {
        load_columns(tile + 1);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      const bool on_diagonal = tile >= diagonal && tile < below;
      const bool with_columns = triangular && !on_diagonal;
      visit(tile, on_diagonal, with_columns);
      __syncthreads();
      if (with_columns) write_columns(tile);
    }
    write_rows();
  }

  __device__ void visit(int tile, bool on_diagonal, bool with_columns) {
    const uint32_t others = shared_ + S::kOther + (tile % kStages) * 2 * S::kOtherBytes;
    Products student = {};
    Products teacher = {};
    mma::multiply_tile<T, kDim, kSlabs>(teacher, shared_ + S::kOwnerTeacher, others + S::kOtherBytes, warp_row());
    mma::multiply_tile<T, kDim, kSlabs>(student, shared_, others, warp_row());

    const auto column = [values = columns(tile % kStages)](int n) {
      return *reinterpret_cast<const ColumnPair*>(values + mma::column_of(n, 0));
    };
    uint8_t seen[kSlabs][kChunkGroups];
    Sums of_columns[2 * kChunkGroups];
    if (on_diagonal) {
      see_others(seen, tile);
      add_chunk<false, true>(student, teacher, rows_, column, seen, factors_, sums_, of_columns);
    } else if (!with_columns) {
      add_chunk<false, false>(student, teacher, rows_, column, seen, factors_, sums_, of_columns);
    } else {
      add_chunk<true, false>(student, teacher, rows_, column, seen, factors_, sums_, of_columns);
      const Sums sums = reduce_columns(of_columns);
      float* to = partial(warp()) + reduced_column();
      to[0] = sums.mass;
      to[kTile] = sums.moment;
      to[2 * kTile] = sums.phi;
    }
  }

  /// In a tile on the diagonal: all other tokens, or, causal, the earlier ones.
  __device__ void see_others(uint8_t (&seen)[kSlabs][kChunkGroups], int tile) const {
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int n = 0; n < kChunkGroups; ++n) {
        seen[m][n] = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = row_of(m, c / 2);
          const int other = tile * kTile + mma::column_of(n, c);
          if (p_.causal ? other < row : other != row) seen[m][n] |= static_cast<uint8_t>(1u << c);
        }
      }
    }
  }

  __device__ float* sums_of(int plane) const {
    return p_.sums + (static_cast<int64_t>(problem_) * kSums + plane) * p_.tokens;
  }

  __device__ void write_columns(int tile) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kSums * kTile) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < mma::kWarps; ++w)
      sum += partial(w)[thread];
    const int token = tile * kTile + thread % kTile;
    if (token < p_.tokens) reduce_add(sums_of(thread / kTile) + token, sum);
  }

  __device__ void write_rows() const {
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float mass = mma::sum_of_row(sums_[m][half].mass);
        const float moment = mma::sum_of_row(sums_[m][half].moment);
        const float phi = mma::sum_of_row(sums_[m][half].phi);
        const int row = row_of(m, half);
        if (threadIdx.x % 4 != 0 || row >= p_.tokens) continue;
        reduce_add(sums_of(0) + row, mass);
        reduce_add(sums_of(1) + row, moment);
        reduce_add(sums_of(2) + row, phi);
      }
    }
  }
};

template <typename T, int kDim, int kSlabs>
__global__ void __launch_bounds__(mma::kThreads, 2)
    forward_kernel(const __grid_constant__ TriangularForwardParams params) {
  Forward<T, kDim, kSlabs>::run(params, dynamic_shared_memory());
}

}  // namespace linearard::cuda::triangular
