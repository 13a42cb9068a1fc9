#pragma once

#include <cstdint>

namespace linearard::cuda {

/// Zeros written by blocks of a kernel that runs anyway: pieces of 16 bytes of a thread.
inline constexpr int kZeroedPieces = 16;

inline int64_t zero_blocks(int64_t floats, int threads) {
  const int64_t of_block = int64_t{4} * kZeroedPieces * threads;
  return (floats + of_block - 1) / of_block;
}

/// @param block of zero_blocks, @param floats a multiple of 4, @param to aligned to 16 bytes
template <int kThreads>
__device__ void write_zeros(float* to, int64_t floats, int64_t block) {
  const int64_t first = block * kZeroedPieces * kThreads + threadIdx.x;
  const int64_t pieces = floats / 4;
#pragma unroll
  for (int i = 0; i < kZeroedPieces; ++i) {
    const int64_t piece = first + i * kThreads;
    if (piece < pieces) reinterpret_cast<float4*>(to)[piece] = float4{0, 0, 0, 0};
  }
}

}  // namespace linearard::cuda
