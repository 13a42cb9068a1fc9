#pragma once

#include "../mma/tiles.cuh"

namespace linearard::cuda::triangular {

/// Blocks of threads of a multiprocessor, which decide the registers of a thread. Three blocks of the smallest
/// dimension have to fit into shared memory, and into registers without spilling.
template <int kDim>
inline constexpr int kForwardBlocks = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int kDim>
inline constexpr int kBackwardBlocks = 2;
#else
template <int kDim>
inline constexpr int kBackwardBlocks = kDim <= 64 ? 3 : 2;
#endif

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

/// Both products of a warp's owners and a tile. If kAhead, the operands of a step are loaded while the step before
/// multiplies.
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
  template <bool kAhead = true>
  __device__ static void multiply(Products& student, Products& teacher, uint32_t owner, uint32_t other) {
    constexpr int kBuffers = kAhead ? 2 : 1;
    const auto load = [&](Operands<T, kDim, kSlabs>& to, int step) {
      const bool of_teacher = step % 2 == 0;
      to.load(owner + (of_teacher ? S::kOwnerTeacher : 0), other + (of_teacher ? S::kOtherBytes : 0), step / 2);
    };
    Operands<T, kDim, kSlabs> operands[kBuffers];
    if (kAhead) load(operands[0], 0);
#pragma unroll
    for (int step = 0; step < 2 * kSteps; ++step) {
      if (step + kBuffers - 1 < 2 * kSteps) {
        load(operands[(step + kBuffers - 1) % kBuffers], step + kBuffers - 1);
      }
      operands[step % kBuffers].multiply(step % 2 == 0 ? teacher : student);
    }
  }
};

}  // namespace linearard::cuda::triangular
