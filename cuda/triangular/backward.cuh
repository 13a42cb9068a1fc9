#pragma once

#include "elements.cuh"
#include "loader.cuh"

namespace linearard::cuda::triangular {

/// H X for kOwners tokens. In the triangular traversal a tile of H also serves the tokens of its columns, H^T X of the
/// owners: H goes through shared memory, where the warps meet, and the products leave by atomic additions.
template <typename T, int kDim, int kSlabs>
class Backward {
  using S = mma::Shape<kDim, kSlabs>;
  using Rows = mma::Layout<kDim>;
  using Products = float[kSlabs][kChunkGroups][4];
  static constexpr int kTile = mma::kOthers;
  static constexpr int kStages = mma::kStages;
  static constexpr int kDimPairs = kDim / 16;  ///< fragments of the dimension, two at a time
  static constexpr int kDimPairsOfWarp = (kDimPairs + mma::kWarps - 1) / mma::kWarps;
  static_assert(kTile == kChunkColumns && kTile == 32);

 public:
  static constexpr int kOwners = S::kOwners;
  // After the vectors: the values of the owners, of a tile's columns for each stage, and H [kOwners, kTile].
  static constexpr int kColumnValues = S::kColumns + kOwners * static_cast<int>(sizeof(BackwardToken));
  static constexpr int kH = kColumnValues + kStages * kTile * static_cast<int>(sizeof(BackwardToken));
  static constexpr int kSharedBytes = kH + kOwners * kTile * 2;

  __device__ static void run(const TriangularBackwardParams& p, char* shared) {
    const int blocks = (p.tokens + kOwners - 1) / kOwners;
    const int problem = static_cast<int>(blockIdx.x) / blocks;
    if (p.wide_heads[problem] != 0) return;
    const int index = static_cast<int>(blockIdx.x) % blocks;
    Backward(p, shared, problem, (p.causal ? blocks - 1 - index : index) * kOwners).run_block();
  }

 private:
  const TriangularBackwardParams& p_;
  const uint32_t shared_;
  char* const memory_;
  const int problem_;
  const int first_;
  float gradient_[kSlabs][kDim / 8][4] = {};

  __device__ Backward(const TriangularBackwardParams& p, char* shared, int problem, int first)
      : p_(p), shared_(shared_address(shared)), memory_(shared), problem_(problem), first_(first) {}

  __device__ const uint8_t* mask() const {
    return p_.mask == nullptr ? nullptr : p_.mask + static_cast<int64_t>(problem_ / p_.heads) * p_.tokens;
  }
  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int warp_row() { return warp() * 16 * kSlabs; }
  __device__ static int row_in_block(int m, int half) { return warp_row() + m * 16 + mma::row_in_slab(half); }
  __device__ const BackwardToken* values() const {
    return p_.token_values + static_cast<int64_t>(problem_) * p_.tokens;
  }
  __device__ BackwardToken* owners() const { return reinterpret_cast<BackwardToken*>(memory_ + S::kColumns); }
  __device__ BackwardToken* columns(int stage) const {
    return reinterpret_cast<BackwardToken*>(memory_ + kColumnValues) + stage * kTile;
  }
  __device__ uint32_t stage_of(int tile) const { return shared_ + S::kOther + tile % kStages * 2 * S::kOtherBytes; }

  __device__ void load_value(BackwardToken* to, int token) const {
    const bool valid = token < p_.tokens;
    copy_async(shared_address(to), values() + (valid ? token : 0), valid);
  }

  /// Made anew for each tile: registers are what this kernel is short of.
  __device__ TileLoader<T, kDim, kTile> loader(const Vectors& vectors) const {
    return {vectors, problem_ / p_.heads, problem_ % p_.heads, p_.tokens, mask()};
  }

  __device__ void load_columns(int tile) const {
    loader(p_.student).load(stage_of(tile), tile * kTile);
    loader(p_.teacher).load(stage_of(tile) + S::kOtherBytes, tile * kTile);
    if (threadIdx.x < kTile) {
      load_value(columns(tile % kStages) + threadIdx.x, tile * kTile + static_cast<int>(threadIdx.x));
    }
    copy_commit();
  }

  __device__ void run_block() {
    TileLoader<T, kDim, kOwners>(p_.student, problem_ / p_.heads, problem_ % p_.heads, p_.tokens, mask())
        .load(shared_, first_);
    TileLoader<T, kDim, kOwners>(p_.teacher, problem_ / p_.heads, problem_ % p_.heads, p_.tokens, mask())
        .load(shared_ + S::kOwnerTeacher, first_);
    if (threadIdx.x < kOwners) load_value(owners() + threadIdx.x, first_ + static_cast<int>(threadIdx.x));

    const int tiles = (p_.tokens + kTile - 1) / kTile;
    const int diagonal = first_ / kTile;
    const int below = min(diagonal + kOwners / kTile, tiles);
    const bool triangular = p_.traversal == Traversal::kTriangular;
    const int begin = triangular && !p_.causal ? diagonal : 0;
    const int end = triangular && p_.causal ? below : tiles;
    load_columns(begin);
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      if (tile + 1 < end) {
        load_columns(tile + 1);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      __syncthreads();
      const bool on_diagonal = tile >= diagonal && tile < below;
      // Causal, a tile on the diagonal has one half; dense, the square holds both.
      const bool with_columns = triangular && (p_.causal || !on_diagonal);
      visit(tile, on_diagonal, tile < diagonal, with_columns);
      __syncthreads();
      if (with_columns) add_columns(tile);
    }
    write_rows();
  }

  __device__ void visit(int tile, bool on_diagonal, bool before_diagonal, bool with_columns) {
    const uint32_t others = stage_of(tile);
    Products student = {};
    Products teacher = {};
    mma::multiply_tile<T, kDim, kSlabs>(teacher, shared_ + S::kOwnerTeacher, others + S::kOtherBytes, warp_row());
    mma::multiply_tile<T, kDim, kSlabs>(student, shared_, others, warp_row());
    if (!p_.causal) {
      weigh<Kind::kBoth>(student, teacher, tile);
    } else if (on_diagonal) {
      weigh<Kind::kDiagonal>(student, teacher, tile);
    } else if (before_diagonal) {
      weigh<Kind::kRows>(student, teacher, tile);
    } else {
      weigh<Kind::kColumns>(student, teacher, tile);
    }
    add_rows(student, others, with_columns);
  }

  /// Which of a pair's terms exist: causal, a pair is in the row of its later token.
  enum class Kind { kBoth, kRows, kColumns, kDiagonal };

  /// Writes H over the student's products.
  template <Kind kKind>
  __device__ void weigh(Products& student, const Products& teacher, int tile) {
    const ElementFactors factors(p_.factors);
    const PairTerms terms{factors};
    const BackwardToken* values = columns(tile % kStages);
    const bool both_halves = p_.traversal == Traversal::kRows;
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
      const BackwardToken rows[2] = {owners()[row_in_block(m, 0)], owners()[row_in_block(m, 1)]};
#pragma unroll
      for (int n = 0; n < kChunkGroups; ++n) {
        const BackwardToken pair[2] = {values[mma::column_of(n, 0)], values[mma::column_of(n, 1)]};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const auto parts = terms(student[m][n][c], teacher[m][n][c], rows[c / 2], pair[c % 2]);
          float weight = parts.first + parts.second;
          if constexpr (kKind == Kind::kRows) weight = parts.first;
          if constexpr (kKind == Kind::kColumns) weight = parts.second;
          if constexpr (kKind == Kind::kDiagonal) {
            // Both products count the diagonal itself, or the one product counts it twice.
            const int distance = tile * kTile + mma::column_of(n, c) - first_ - row_in_block(m, c / 2);
            weight = 0;
            if (distance <= 0) weight = parts.first;
            if (both_halves && distance >= 0) weight += parts.second;
          }
          student[m][n][c] = parts.e * weight;
          if constexpr (kKind == Kind::kDiagonal) {
            if (weight == 0) student[m][n][c] = 0;  // of a pair that does not exist, whatever its logits
          }
        }
      }
    }
  }

  /// Place of a chunk of 8 columns of H; so that 8 rows of a chunk, and 4 threads of 8 rows, lie in different banks.
  __device__ uint32_t place_in_h(int row, int chunk) const {
    return shared_ + kH + row * kTile * 2 + ((chunk ^ (row >> 1 & 3)) << 4);
  }

  /// gradient += H X of the columns; stores H for add_columns.
  __device__ void add_rows(const Products& h, uint32_t others, bool with_columns) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const uint32_t address = others + Rows::offset(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      uint32_t a[kSlabs][4];
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = 2 * k + e / 2;
          a[m][e] = pack<T>(h[m][n][2 * (e % 2)], h[m][n][2 * (e % 2) + 1]);
          if (with_columns) {
            store_shared(place_in_h(row_in_block(m, e % 2), n) + lane % 4 * 4, a[m][e]);
          }
        }
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

  __device__ float* gradient_of(int token) const {
    return p_.gradient + (static_cast<int64_t>(problem_) * p_.tokens + token) * p_.student.dim;
  }

  /// H^T X of the owners, a part of the dimension for each warp.
  __device__ void add_columns(int tile) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float sums[2][kDimPairsOfWarp][2][4] = {};
    const uint32_t x = shared_ + Rows::offset(lane % 16, lane / 16);
#pragma unroll 1
    for (int row = 0; row < kOwners; row += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        // Matrices of 8 rows of H x 8 columns become 8 columns x 8 rows: (rows, columns) low/low, low/high, high/low.
        load_matrices_transposed(a[m], place_in_h(row + lane / 16 * 8 + lane % 8, 2 * m + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < kDimPairsOfWarp; ++i) {
        const int pair = warp() + i * mma::kWarps;
        if (pair >= kDimPairs) break;
        uint32_t b[4];
        load_matrices_transposed(b, Rows::advance(x, pair) + row * Rows::kRowBytes);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(sums[m][i][0], a[m], b[0], b[1]);
          multiply_add<T>(sums[m][i][1], a[m], b[2], b[3]);
        }
      }
    }
    if (p_.student.dim == kDim) {
      write_columns<true>(tile, sums);
    } else {
      write_columns<false>(tile, sums);
    }
  }

  template <bool kWhole>
  __device__ void write_columns(int tile, const float (&sums)[2][kDimPairsOfWarp][2][4]) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = tile * kTile + m * 16 + mma::row_in_slab(half);
        if (token >= p_.tokens) continue;
        float* to = gradient_of(token);
#pragma unroll
        for (int i = 0; i < kDimPairsOfWarp; ++i) {
          const int pair = warp() + i * mma::kWarps;
          if (pair >= kDimPairs) break;
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            add_two<kWhole>(to, pair * 16 + mma::column_of(n, 0), sums[m][i][n][2 * half], sums[m][i][n][2 * half + 1]);
          }
        }
      }
    }
  }

  /// @param kWhole whether the dimension is kDim
  template <bool kWhole>
  __device__ void add_two(float* vector, int d, float x, float y) const {
    const int dim = p_.student.dim;
    if (kWhole || (d + 1 < dim && dim % 2 == 0)) {
      reduce_add_two(vector + d, x, y);
    } else {
      if (d < dim) reduce_add(vector + d, x);
      if (d + 1 < dim) reduce_add(vector + d + 1, y);
    }
  }

  __device__ void write_rows() const {
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first_ + row_in_block(m, half);
        if (token >= p_.tokens) continue;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          add_two<false>(gradient_of(token), mma::column_of(n, 0), gradient_[m][n][2 * half],
                         gradient_[m][n][2 * half + 1]);
        }
      }
    }
  }
};

template <typename T, int kDim, int kSlabs>
__global__ void __launch_bounds__(mma::kThreads, 2)
    backward_kernel(const __grid_constant__ TriangularBackwardParams params) {
  Backward<T, kDim, kSlabs>::run(params, dynamic_shared_memory());
}

}  // namespace linearard::cuda::triangular
