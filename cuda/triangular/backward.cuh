#pragma once

#include "elements.cuh"
#include "group.cuh"
#include "loader.cuh"
#include "order.cuh"
#include "products.cuh"

namespace linearard::cuda::triangular {

/// H X for kOwners tokens. In the triangular traversal a tile of H also serves the tokens of its columns, H^T X of the
/// owners: H goes through shared memory, where the warps meet, and the products leave by atomic additions.
template <typename T, int kDim, int kSlabs>
class Backward {
  using S = mma::Shape<kDim, kSlabs>;
  using Rows = mma::Layout<kDim>;
  using Both = TileProducts<T, kDim, kSlabs>;
  using Products = typename Both::Products;
  static constexpr int kTile = mma::kOthers;
  static constexpr int kStages = mma::kStages;
  static constexpr int kDimPairs = kDim / 16;  ///< fragments of the dimension, two at a time
  static constexpr int kDimPairsOfWarp = (kDimPairs + mma::kWarps - 1) / mma::kWarps;
  static_assert(kTile == kChunkColumns && kTile == 32);

  /// A block's head and walk. In shared memory: registers are what this kernel is short of.
  struct alignas(16) Walk {
    const T* student;
    const T* teacher;
    int64_t student_stride;  ///< between tokens
    int64_t teacher_stride;
    const uint8_t* mask;
    float* gradient;
    const BackwardToken* values;
    int first;  ///< owner
    int end;    ///< tile
  };

 public:
  static constexpr int kOwners = S::kOwners;
  // After the vectors: the values of the owners, of a tile's columns for each stage, and H [kOwners, kTile].
  static constexpr int kColumnValues = S::kColumns + kOwners * static_cast<int>(sizeof(BackwardToken));
  static constexpr int kH = kColumnValues + kStages * kTile * static_cast<int>(sizeof(BackwardToken));
  static_assert(kH % (kTile * 2) == 0);
  static constexpr int kWalk = kH + kOwners * kTile * 2;
  static constexpr int kSharedBytes = kWalk + static_cast<int>(sizeof(Walk));

  __device__ static void run(const TriangularBackwardParams& p, char* shared) {
    const int blocks = (p.tokens + kOwners - 1) / kOwners;
    const auto [problem, index] = BlockOrder::of_block(static_cast<int>(blockIdx.x), blocks, p.group.problems);
    if (p.wide_heads[problem] != 0) return;
    Backward(p, shared).run_block(problem, (p.causal ? blocks - 1 - index : index) * kOwners);
  }

 private:
  const TriangularBackwardParams& p_;
  const uint32_t shared_;
  float gradient_[kSlabs][kDim / 8][4] = {};

  __device__ Backward(const TriangularBackwardParams& p, char* shared) : p_(p), shared_(shared_address(shared)) {}

  __device__ static int warp() { return static_cast<int>(threadIdx.x) / 32; }
  __device__ static int warp_row() { return warp() * 16 * kSlabs; }
  __device__ static int row_in_block(int m, int half) { return warp_row() + m * 16 + mma::row_in_slab(half); }
  __device__ BackwardToken* owners() const {
    return reinterpret_cast<BackwardToken*>(dynamic_shared_memory() + S::kColumns);
  }
  __device__ BackwardToken* columns(int tile) const {
    return reinterpret_cast<BackwardToken*>(dynamic_shared_memory() + kColumnValues) + stage_of(tile) * kTile;
  }
  __device__ static unsigned stage_of(int tile) { return static_cast<unsigned>(tile) % kStages; }
  __device__ uint32_t vectors_of(int tile) const { return shared_ + S::kOther + stage_of(tile) * 2 * S::kOtherBytes; }

  __device__ void load_value(BackwardToken* to, int token) const {
    const bool valid = token < p_.tokens;
    copy_async(shared_address(to), walk()->values + (valid ? token : 0), valid);
  }

  __device__ Walk* walk() const { return reinterpret_cast<Walk*>(dynamic_shared_memory() + kWalk); }

  /// Both vectors of kRows tokens.
  template <int kRows>
  __device__ void load(uint32_t student, uint32_t teacher, int first) const {
    using Loader = TileLoader<T, kDim, kRows>;
    const Walk w = *walk();
    const int dim = p_.student.dim;
    const bool whole = Loader::is_whole(dim, first, p_.tokens, w.mask);
    const unsigned thread = anew(static_cast<int>(threadIdx.x));
    Loader(w.student, w.student_stride, dim, p_.tokens, w.mask, thread).load(student, first, whole);
    Loader(w.teacher, w.teacher_stride, dim, p_.tokens, w.mask, thread).load(teacher, first, whole);
  }

  __device__ void load_columns(int tile) const {
    load<kTile>(vectors_of(tile), vectors_of(tile) + S::kOtherBytes, tile * kTile);
    if (threadIdx.x < kTile) {
      load_value(columns(tile) + threadIdx.x, tile * kTile + static_cast<int>(threadIdx.x));
    }
    copy_commit();
  }

  __device__ void run_block(int problem, int first) {
    const int tiles = (p_.tokens + kTile - 1) / kTile;
    const bool triangular = p_.traversal == Traversal::kTriangular;
    const int begin = triangular && !p_.causal ? first / kTile : 0;
    if (threadIdx.x == 0) {
      const Place place = place_of(p_.group, problem);
      const Vectors& of_student = p_.vectors.student[place.relation];
      const Vectors& of_teacher = p_.vectors.teacher[place.relation];
      const int64_t before = static_cast<int64_t>(problem) * p_.tokens;
      *walk() = {head_of<T>(of_student, place.batch, place.head),
                 head_of<T>(of_teacher, place.batch, place.head),
                 of_student.token_stride,
                 of_teacher.token_stride,
                 p_.mask == nullptr ? nullptr : p_.mask + static_cast<int64_t>(place.batch) * p_.tokens,
                 p_.gradient + before * p_.student.dim,
                 p_.token_values + before,
                 first,
                 triangular && p_.causal ? min((first + kOwners) / kTile, tiles) : tiles};
    }
    __syncthreads();
    load<kOwners>(shared_, shared_ + S::kOwnerTeacher, first);
    if (threadIdx.x < kOwners) load_value(owners() + threadIdx.x, first + static_cast<int>(threadIdx.x));

    load_columns(begin);
#pragma unroll 1
    for (int tile = begin; tile < walk()->end; ++tile) {
      if (tile + 1 < walk()->end) {
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
  __device__ int tiles_behind(int tile) const { return tile - walk()->first / kTile; }
  __device__ bool is_on_diagonal(int tile) const {
    return static_cast<unsigned>(tiles_behind(tile)) < static_cast<unsigned>(kOwners / kTile);
  }
  /// Causal, a tile on the diagonal has one half; dense, the square holds both.
  __device__ bool with_columns(int tile) const {
    return p_.traversal == Traversal::kTriangular && (p_.causal || !is_on_diagonal(tile));
  }

  __device__ void visit(int tile) {
    const uint32_t others = vectors_of(tile);
    Products student = {};
    Products teacher = {};
    // Addresses are cheap to compute, and many: kept from tile to tile they would spill what is needed.
    const unsigned thread = anew(static_cast<int>(threadIdx.x));
    Both::template multiply<(kBackwardBlocks<kDim> < 3)>(student, teacher, Both::owner_address(shared_, thread),
                                                         others + Both::other_offset(thread));
    if (!p_.causal) {
      weigh<Kind::kBoth>(student, teacher, tile);
    } else if (is_on_diagonal(tile)) {
      weigh<Kind::kDiagonal>(student, teacher, tile);
    } else if (tiles_behind(tile) < 0) {
      weigh<Kind::kRows>(student, teacher, tile);
    } else {
      weigh<Kind::kColumns>(student, teacher, tile);
    }
    add_rows(student, others);
  }

  /// Which of a pair's terms exist: causal, a pair is in the row of its later token.
  enum class Kind { kBoth, kRows, kColumns, kDiagonal };

  /// Writes H over the student's products.
  template <Kind kKind>
  __device__ void weigh(Products& student, const Products& teacher, int tile) {
    const ElementFactors factors(p_.factors);
    const PairTerms terms{factors};
    const int thread = anew(static_cast<int>(threadIdx.x));
    const int first_row = thread / 32 * 16 * kSlabs + thread % 32 / 4;
    const int first_column = thread % 4 * 2;
    const BackwardToken* values = columns(tile) + first_column;
    const BackwardToken* owner = owners() + first_row;
    const bool both_halves = p_.traversal == Traversal::kRows;
    // Column less row of the thread's first element.
    const int corner = anew(tile) * kTile + first_column - walk()->first - first_row;
#pragma unroll
    for (int n = 0; n < kChunkGroups; ++n) {
      const BackwardToken pair[2] = {values[n * 8], values[n * 8 + 1]};
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
        const BackwardToken rows[2] = {owner[m * 16], owner[m * 16 + 8]};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const auto parts =
              terms(factors.difference(student[m][n][c], teacher[m][n][c]), teacher[m][n][c], rows[c / 2], pair[c % 2]);
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
  __device__ void add_rows(const Products& h, uint32_t others) {
    const unsigned thread = anew(static_cast<int>(threadIdx.x));
    const unsigned lane = thread % 32;
    const uint32_t place = place_in_h(thread / 32 * 16 * kSlabs + lane / 4, 0) + lane % 4 * 4;
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
          // The same place in rows 8 apart.
          store_shared((place ^ n << 4) + (m * 16 + e % 2 * 8) * kTile * 2, a[m][e]);
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
    return walk()->gradient + static_cast<int64_t>(token) * p_.student.dim;
  }

  /// Operands of 16 owners' share of H^T X: 32 columns of H, and a warp's part of the dimension.
  struct ColumnOperands {
    uint32_t h[2][4];
    uint32_t x[kDimPairsOfWarp][4];
  };
  /// Whether the warp has an i-th pair of fragments of the dimension.
  __device__ static bool has_pair(unsigned warp, int i) {
    return kDimPairs % mma::kWarps == 0 || static_cast<int>(warp) + i * mma::kWarps < kDimPairs;
  }

  /// H^T X of the owners, a part of the dimension for each warp.
  __device__ void add_columns(int tile) const {
    constexpr int kSteps = kOwners / 16;
    const unsigned thread = anew(static_cast<int>(threadIdx.x));
    const unsigned lane = thread % 32;
    const unsigned warp = thread / 32;
    // Matrices of 8 rows of H x 8 columns become 8 columns x 8 rows: (rows, columns) low/low, low/high, high/low.
    const unsigned row = lane / 16 * 8 + lane % 8;
    const uint32_t h[2] = {place_in_h(row, lane / 8 % 2), place_in_h(row, 2 + lane / 8 % 2)};
    const uint32_t x = Rows::advance(shared_ + Rows::offset(lane % 16, lane / 16), warp);
    const auto load = [&](ColumnOperands& to, int step) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices_transposed(to.h[m], h[m] + step * 16 * kTile * 2);
      }
#pragma unroll
      for (int i = 0; i < kDimPairsOfWarp; ++i) {
        if (!has_pair(warp, i)) break;
        load_matrices_transposed(to.x[i], Rows::advance(x, i * mma::kWarps) + step * 16 * Rows::kRowBytes);
      }
    };
    float sums[2][kDimPairsOfWarp][2][4] = {};
    ColumnOperands operands[2];
    load(operands[0], 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step + 1 < kSteps) load(operands[(step + 1) % 2], step + 1);
      const ColumnOperands& now = operands[step % 2];
#pragma unroll
      for (int i = 0; i < kDimPairsOfWarp; ++i) {
        if (!has_pair(warp, i)) break;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply_add<T>(sums[m][i][n], now.h[m], now.x[i][2 * n], now.x[i][2 * n + 1]);
          }
        }
      }
    }
    give_columns(tile, sums, lane, warp);
  }

  __device__ void give_columns(int tile,
                               const float (&sums)[2][kDimPairsOfWarp][2][4],
                               unsigned lane,
                               unsigned warp) const {
    const int first = tile * kTile + static_cast<int>(lane / 4);
    const int first_dim = static_cast<int>(warp * 16 + lane % 4 * 2);
    const auto give = [&](float* to, int m, int half, int i, int n) {
      reduce_add_two(to + i * mma::kWarps * 16 + n * 8, sums[m][i][n][2 * half], sums[m][i][n][2 * half + 1]);
    };
    if (tile * kTile + kTile <= p_.tokens && p_.student.dim == kDim) [[likely]] {
      float* to = walk()->gradient + static_cast<int64_t>(first) * kDim + first_dim;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < kDimPairsOfWarp; ++i) {
            if (!has_pair(warp, i)) break;
            give(to + (m * 16 + half * 8) * kDim, m, half, i, 0);
            give(to + (m * 16 + half * 8) * kDim, m, half, i, 1);
          }
        }
      }
      return;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = first + m * 16 + half * 8;
        if (token >= p_.tokens) continue;
        float* to = gradient_of(token) + first_dim;
#pragma unroll
        for (int i = 0; i < kDimPairsOfWarp; ++i) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            if (first_dim + i * mma::kWarps * 16 + n * 8 < p_.student.dim) give(to, m, half, i, n);
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
        const int token = walk()->first + row_in_block(m, half);
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
__global__ void __launch_bounds__(mma::kThreads, kBackwardBlocks<kDim>)
    backward_kernel(const __grid_constant__ TriangularBackwardParams params) {
  Backward<T, kDim, kSlabs>::run(params, dynamic_shared_memory());
}

}  // namespace linearard::cuda::triangular
