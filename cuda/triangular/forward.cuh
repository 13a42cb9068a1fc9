#pragma once

#include "elements.cuh"
#include "group.cuh"
#include "loader.cuh"
#include "order.cuh"
#include "products.cuh"

namespace linearard::cuda::triangular {

/// The sums of kOwners rows over the other tokens, and, in the triangular traversal, those of the columns that they
/// meet. Tiles on the diagonal are visited as a square, for their rows only, without the diagonal itself.
template <typename T, int kDim, int kSlabs>
class Forward {
  using S = mma::Shape<kDim, kSlabs>;
  using Both = TileProducts<T, kDim, kSlabs>;
  using Products = typename Both::Products;
  static constexpr int kTile = mma::kOthers;
  static constexpr int kStages = mma::kStages;
  static_assert(kTile == kChunkColumns);

 public:
  static constexpr int kOwners = S::kOwners;
  // After the vectors: the values of a tile's columns for each stage, and each warp's sums of the columns, for two
  // tiles.
  static constexpr int kPartial = S::kColumns + kStages * kTile * static_cast<int>(sizeof(ForwardToken));
  static constexpr int kSharedBytes = kPartial + 2 * mma::kWarps * kSums * kTile * static_cast<int>(sizeof(float));

  __device__ static void run(const TriangularForwardParams& p, char* shared) {
    const int blocks = (p.tokens + kOwners - 1) / kOwners;
    const auto [problem, index] = BlockOrder::of_block(static_cast<int>(blockIdx.x), blocks, p.group.problems);
    if (p.wide_heads[problem] != 0) return;
    // The first block of rows sees most tiles, or, causal, the last one.
    Forward(p, shared, problem, place_of(p.group, problem), (p.causal ? blocks - 1 - index : index) * kOwners)
        .run_block();
  }

 private:
  const TriangularForwardParams& p_;
  const uint32_t shared_;
  char* const memory_;
  const int problem_;
  const int relation_;
  const int first_;
  const ElementFactors factors_;
  const T* const student_;  ///< the head's vectors
  const T* const teacher_;
  const uint8_t* const mask_;
  const uint32_t owner_;  ///< of the thread's loads of matrices
  const uint32_t other_;
  ForwardToken rows_[kSlabs][2];
  Sums sums_[kSlabs][2];

  __device__ Forward(const TriangularForwardParams& p, char* shared, int problem, const Place& place, int first)
      : p_(p),
        shared_(shared_address(shared)),
        memory_(shared),
        problem_(problem),
        relation_(place.relation),
        first_(first),
        factors_(p.factors),
        student_(head_of<T>(p.vectors.student[place.relation], place.batch, place.head)),
        teacher_(head_of<T>(p.vectors.teacher[place.relation], place.batch, place.head)),
        mask_(p.mask == nullptr ? nullptr : p.mask + static_cast<int64_t>(place.batch) * p.tokens),
        owner_(Both::owner_address(shared_, threadIdx.x)),
        other_(shared_ + S::kOther + Both::other_offset(threadIdx.x)) {}

  /// Both vectors of kRows tokens.
  template <int kRows>
  __device__ void load(uint32_t student, uint32_t teacher, int first) const {
    using Loader = TileLoader<T, kDim, kRows>;
    const bool whole = Loader::is_whole(p_.student.dim, first, p_.tokens, mask_);
    const auto load = [&](uint32_t to, const T* head, int64_t token_stride) {
      Loader(head, token_stride, p_.student.dim, p_.tokens, mask_, threadIdx.x).load(to, first, whole);
    };
    load(student, student_, p_.vectors.student[relation_].token_stride);
    load(teacher, teacher_, p_.vectors.teacher[relation_].token_stride);
  }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int warp_row() { return warp() * 16 * kSlabs; }
  __device__ int row_of(int m, int half) const { return first_ + warp_row() + m * 16 + mma::row_in_slab(half); }
  __device__ const ForwardToken* values() const { return p_.token_values + static_cast<int64_t>(problem_) * p_.tokens; }
  __device__ static unsigned stage_of(int tile) { return static_cast<unsigned>(tile) % kStages; }
  __device__ ForwardToken* columns(int tile) const {
    return reinterpret_cast<ForwardToken*>(memory_ + S::kColumns) + stage_of(tile) * kTile;
  }
  __device__ float* partial(int tile, int warp) const {
    return reinterpret_cast<float*>(memory_ + kPartial) +
           (static_cast<unsigned>(tile) % 2 * mma::kWarps + warp) * kSums * kTile;
  }

  __device__ void load_columns(int tile) const {
    const uint32_t to = shared_ + S::kOther + stage_of(tile) * 2 * S::kOtherBytes;
    load<kTile>(to, to + S::kOtherBytes, tile * kTile);
    if (threadIdx.x < kTile) {
      const int token = tile * kTile + static_cast<int>(threadIdx.x);
      const bool valid = token < p_.tokens;
      copy_async_8(shared_address(columns(tile) + threadIdx.x), values() + (valid ? token : 0), valid);
    }
    copy_commit();
  }

  __device__ void run_block() {
    load<kOwners>(shared_, shared_ + S::kOwnerTeacher, first_);
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
    // One barrier a tile. Behind it the tile is there, the stage of the tile before is free, and the sums of that
    // tile's columns are complete.
    bool columns_left = false;
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      copy_wait<0>();
      __syncthreads();
      if (tile + 1 < end) load_columns(tile + 1);
      if (columns_left) write_columns(tile - 1);
      const bool on_diagonal = tile >= diagonal && tile < below;
      columns_left = triangular && !on_diagonal;
      visit(tile, on_diagonal, columns_left);
    }
    __syncthreads();
    if (columns_left) write_columns(end - 1);
    write_rows();
  }

  __device__ void visit(int tile, bool on_diagonal, bool with_columns) {
    Products student = {};
    Products teacher = {};
    Both::multiply(student, teacher, owner_, other_ + stage_of(tile) * 2 * S::kOtherBytes);

    const auto column = [values = columns(tile)](int n) {
      return *reinterpret_cast<const ColumnPair*>(values + mma::column_of(n, 0));
    };
    uint8_t seen[kSlabs][kChunkGroups];
    Sums of_columns[2 * kChunkGroups];
    if (on_diagonal) {
      write_own(student, teacher, tile);
      see_others(seen, tile);
      add_chunk<false, true>(student, teacher, rows_, column, seen, factors_, sums_, of_columns);
    } else if (!with_columns) {
      add_chunk<false, false>(student, teacher, rows_, column, seen, factors_, sums_, of_columns);
    } else {
      add_chunk<true, false>(student, teacher, rows_, column, seen, factors_, sums_, of_columns);
      const Sums sums = reduce_columns(of_columns);
      float* to = partial(tile, warp()) + reduced_column();
      to[0] = sums.mass;
      to[kTile] = sums.moment;
      to[2 * kTile] = sums.phi;
    }
  }

  __device__ void write_own(const Products& student, const Products& teacher, int tile) const {
    OwnLogit* const own = p_.own + static_cast<int64_t>(problem_) * p_.tokens;
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int n = 0; n < kChunkGroups; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = row_of(m, c / 2);
          if (tile * kTile + mma::column_of(n, c) != row || row >= p_.tokens) continue;
          own[row] = factors_.own_logit(student[m][n][c], teacher[m][n][c]);
        }
      }
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
      sum += partial(tile, w)[thread];
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
__global__ void __launch_bounds__(mma::kThreads, kForwardBlocks<kDim>)
    forward_kernel(const __grid_constant__ TriangularForwardParams params) {
  Forward<T, kDim, kSlabs>::run(params, dynamic_shared_memory());
}

}  // namespace linearard::cuda::triangular
