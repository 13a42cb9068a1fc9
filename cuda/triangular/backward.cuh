#pragma once

#include "elements.cuh"
#include "loader.cuh"
#include "order.cuh"

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
    const auto [problem, index] = BlockOrder::of_block(static_cast<int>(blockIdx.x), blocks, p.batch * p.heads);
    if (p.wide_heads[problem] != 0) return;
    Backward(p, shared, problem, (p.causal ? blocks - 1 - index : index) * kOwners).run_block();
  }

 private:
  const TriangularBackwardParams& p_;
  const uint32_t shared_;
  const int problem_;
  const int first_;
  float gradient_[kSlabs][kDim / 8][4] = {};

  __device__ Backward(const TriangularBackwardParams& p, char* shared, int problem, int first)
      : p_(p), shared_(shared_address(shared)), problem_(problem), first_(first) {}

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int warp_row() { return warp() * 16 * kSlabs; }
  __device__ static int row_in_block(int m, int half) { return warp_row() + m * 16 + mma::row_in_slab(half); }
  __device__ const BackwardToken* values() const {
    return p_.token_values + static_cast<int64_t>(problem_) * p_.tokens;
  }
  __device__ BackwardToken* owners() const {
    return reinterpret_cast<BackwardToken*>(dynamic_shared_memory() + S::kColumns);
  }
  __device__ BackwardToken* columns(int stage) const {
    return reinterpret_cast<BackwardToken*>(dynamic_shared_memory() + kColumnValues) + stage * kTile;
  }
  __device__ uint32_t stage_of(int tile) const { return shared_ + S::kOther + tile % kStages * 2 * S::kOtherBytes; }

  __device__ void load_value(BackwardToken* to, int token) const {
    const bool valid = token < p_.tokens;
    copy_async(shared_address(to), values() + (valid ? token : 0), valid);
  }

  /// Made for each tile: registers are what this kernel is short of.
  template <int kRows>
  __device__ TileLoader<T, kDim, kRows> loader(const Vectors& vectors) const {
    const int problem = anew(problem_);
    const int batch = problem / p_.heads;
    const uint8_t* mask = p_.mask == nullptr ? nullptr : p_.mask + static_cast<int64_t>(batch) * p_.tokens;
    return {vectors, batch, problem % p_.heads, p_.tokens, mask, anew(static_cast<int>(threadIdx.x))};
  }

  __device__ void load_columns(int tile) const {
    loader<kTile>(p_.student).load(stage_of(tile), tile * kTile);
    loader<kTile>(p_.teacher).load(stage_of(tile) + S::kOtherBytes, tile * kTile);
    if (threadIdx.x < kTile) {
      load_value(columns(tile % kStages) + threadIdx.x, tile * kTile + static_cast<int>(threadIdx.x));
    }
    copy_commit();
  }

  __device__ void run_block() {
    loader<kOwners>(p_.student).load(shared_, first_);
    loader<kOwners>(p_.teacher).load(shared_ + S::kOwnerTeacher, first_);
    if (threadIdx.x < kOwners) load_value(owners() + threadIdx.x, first_ + static_cast<int>(threadIdx.x));

    const int tiles = (p_.tokens + kTile - 1) / kTile;
    const bool triangular = p_.traversal == Traversal::kTriangular;
    const int begin = triangular && !p_.causal ? first_ / kTile : 0;
    const int end = triangular && p_.causal ? min((first_ + kOwners) / kTile, tiles) : tiles;
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
      visit(tile);
      __syncthreads();
      if (with_columns(tile)) add_columns(tile);
    }
    write_rows();
  }

  /// How many tiles behind the block's first tile on the diagonal.
  __device__ int tiles_behind(int tile) const { return tile - anew(first_) / kTile; }
  __device__ bool is_on_diagonal(int tile) const {
    return static_cast<unsigned>(tiles_behind(tile)) < static_cast<unsigned>(kOwners / kTile);
  }
  /// Causal, a tile on the diagonal has one half; dense, the square holds both.
  __device__ bool with_columns(int tile) const {
    return p_.traversal == Traversal::kTriangular && (p_.causal || !is_on_diagonal(tile));
  }

  __device__ void visit(int tile) {
    const uint32_t others = stage_of(tile);
    Products student = {};
    Products teacher = {};
    mma::multiply_tile<T, kDim, kSlabs, 2>(teacher, shared_ + S::kOwnerTeacher, others + S::kOtherBytes, warp_row());
    mma::multiply_tile<T, kDim, kSlabs, 2>(student, shared_, others, warp_row());
    if (!p_.causal) {
      weigh<Kind::kBoth>(student, teacher, tile);
    } else if (is_on_diagonal(tile)) {
      weigh<Kind::kDiagonal>(student, teacher, tile);
    } else if (tiles_behind(tile) < 0) {
      weigh<Kind::kRows>(student, teacher, tile);
    } else {
      weigh<Kind::kColumns>(student, teacher, tile);
    }
    add_rows(student, others, with_columns(tile));
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
    // Column less row of the thread's first element.
    const int corner = anew(tile) * kTile + mma::column_of(0, 0) - first_ - row_in_block(0, 0);
#pragma unroll
    for (int n = 0; n < kChunkGroups; ++n) {
      const BackwardToken pair[2] = {values[mma::column_of(n, 0)], values[mma::column_of(n, 1)]};
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
        const BackwardToken* owner = owners() + row_in_block(m, 0);
        const BackwardToken rows[2] = {owner[0], owner[8]};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const auto parts = terms(student[m][n][c], teacher[m][n][c], rows[c / 2], pair[c % 2]);
          float weight = parts.first + parts.second;
          if constexpr (kKind == Kind::kRows) weight = parts.first;
          if constexpr (kKind == Kind::kColumns) weight = parts.second;
          if constexpr (kKind == Kind::kDiagonal) {
            // Both products count the diagonal itself, or the one product counts it twice.
            const int distance = corner + n * 8 + c % 2 - m * 16 - c / 2 * 8;
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
    const int thread = anew(static_cast<int>(threadIdx.x));
    const int lane = thread % 32;
    const int first_row = thread / 32 * 16 * kSlabs + lane / 4;
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
            store_shared(place_in_h(first_row + m * 16 + e % 2 * 8, n) + lane % 4 * 4, a[m][e]);
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
    return p_.gradient + (static_cast<int64_t>(anew(problem_)) * p_.tokens + token) * p_.student.dim;
  }

  /// H^T X of the owners, a part of the dimension for each warp.
  __device__ void add_columns(int tile) const {
    const int thread = anew(static_cast<int>(threadIdx.x));
    const int lane = thread % 32;
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
        const int pair = thread / 32 + i * mma::kWarps;
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
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = tile * kTile + m * 16 + half * 8 + lane / 4;
        if (token >= p_.tokens) continue;
        float* to = gradient_of(token) + thread / 32 * 16 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kDimPairsOfWarp; ++i) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const int d = thread / 32 * 16 + lane % 4 * 2 + i * mma::kWarps * 16 + n * 8;
            if (d >= p_.student.dim) continue;
            reduce_add_two(to + i * mma::kWarps * 16 + n * 8, sums[m][i][n][2 * half], sums[m][i][n][2 * half + 1]);
          }
        }
      }
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
          const int d = mma::column_of(n, 0);
          if (d >= p_.student.dim) continue;
          reduce_add_two(gradient_of(token) + d, gradient_[m][n][2 * half], gradient_[m][n][2 * half + 1]);
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
