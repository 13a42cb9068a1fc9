#pragma once

#include "../mma/tiles.cuh"

namespace linearard::cuda::triangular {

/// Operands of one step of 16 dimensions: the owners of a warp, and a tile's others.
template <typename T, int kDim, int kSlabs>
struct Operands {
  using Rows = mma::Layout<kDim>;
  uint32_t owners[kSlabs][4];
  uint32_t others[mma::kColumnGroups / 2][4];

  __device__ void load(uint32_t owner, uint32_t other, int step) {
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
      load_matrices(owners[m], Rows::advance(owner, step) + m * 16 * Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < mma::kColumnGroups / 2; ++n) {
      load_matrices(others[n], Rows::advance(other, step) + n * 16 * Rows::kRowBytes);
    }
  }

  __device__ void multiply(float (&products)[kSlabs][mma::kColumnGroups][4]) const {
#pragma unroll
    for (int n = 0; n < mma::kColumnGroups; ++n) {
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
        multiply_add<T>(products[m][n], owners[m], others[n / 2][n % 2 * 2], others[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
};

/// Both products of a warp's owners and a tile. The operands of a step are loaded while the step before multiplies.
template <typename T, int kDim, int kSlabs>
class TileProducts {
  using S = mma::Shape<kDim, kSlabs>;
  using Rows = mma::Layout<kDim>;
  static constexpr int kSteps = kDim / 16;

 public:
  using Products = float[kSlabs][mma::kColumnGroups][4];

  /// Addresses that a thread gives to the loads of matrices: of the owners, and in a tile.
  __device__ static uint32_t owner_address(uint32_t owners, unsigned thread) {
    return owners + Rows::offset(thread / 32 * 16 * kSlabs + thread % 16, thread / 16 % 2);
  }
  __device__ static uint32_t other_offset(unsigned thread) {
    return Rows::offset(thread / 16 % 2 * 8 + thread % 8, thread / 8 % 2);
  }

  /// @param owner address of the student's, @param other likewise in the stage
  __device__ static void multiply(Products& student, Products& teacher, uint32_t owner, uint32_t other) {
    Operands<T, kDim, kSlabs> operands[2];
    operands[0].load(owner + S::kOwnerTeacher, other + S::kOtherBytes, 0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      operands[1].load(owner, other, k);
      operands[0].multiply(teacher);
      if (k + 1 < kSteps) operands[0].load(owner + S::kOwnerTeacher, other + S::kOtherBytes, k + 1);
      operands[1].multiply(student);
    }
  }
};

}  // namespace linearard::cuda::triangular
