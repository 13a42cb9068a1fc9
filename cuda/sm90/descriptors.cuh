#pragma once

#include <cstdint>

// Matrices of 16-bit elements in shared memory as the tensor cores read them, with the copy engine's 128-byte swizzle.
//
// A tile of vectors lies there as chunks of 64 dimensions: [chunk][token][64 dimensions]. A token's 64 dimensions are
// a line of 128 bytes, whose pieces of 16 bytes are exchanged by the token's number modulo 8: piece p of token t lies
// at p ^ (t % 8). Eight lines, 1024 bytes, are the unit of the swizzle, and chunks begin at multiples of it.

namespace linearard::cuda::sm90 {

inline constexpr int kChunkDims = 64;
inline constexpr int kLineBytes = 128;
inline constexpr int kSwizzleBytes = 8 * kLineBytes;
/// Dimensions or tokens that one instruction sums over.
inline constexpr int kStep = 16;

/// Bits 0-13 address, 16-29 leading and 32-45 stride offset, all in units of 16 bytes, 62-63 the swizzle (1: 128
/// bytes). The stride goes to the next eight lines. The leading offset goes to the next 64 dimensions where the sum is
/// over tokens, and is not used where it is over dimensions.
template <int kChunkBytes>
__device__ uint64_t matrix_descriptor(uint32_t shared) {
  constexpr uint64_t kLayout = uint64_t{1} << 62 | static_cast<uint64_t>(kSwizzleBytes / 16) << 32 |
                               static_cast<uint64_t>(kChunkBytes / 16) << 16;
  return kLayout | (shared & 0x3ffffu) >> 4;
}

/// Operand of a sum over dimensions ("K-major", X_I and X_J in X_I X_J^T): what to add for its step-th 16 of them.
template <int kChunkBytes>
__device__ constexpr uint64_t dimension_step(int step) {
  constexpr int kStepsOfChunk = kChunkDims / kStep;
  return static_cast<uint64_t>(step / kStepsOfChunk * kChunkBytes + step % kStepsOfChunk * kStep * 2) / 16;
}

/// Operand of a sum over tokens ("MN-major", X_J in H X_J): what to add for its step-th 16 of them.
__device__ constexpr uint64_t token_step(int step) { return static_cast<uint64_t>(step * kStep * kLineBytes) / 16; }

/// Where piece `piece` of 16 bytes of a token's line lies. Exchanging bits of the address exchanges those of the piece.
__device__ inline uint32_t swizzled(uint32_t chunk, int token, int piece) {
  return chunk + token * kLineBytes + ((piece ^ (token & 7)) << 4);
}
/// The piece of the step-th 16 of a line's elements from that of the first 16.
__device__ constexpr uint32_t swizzled_step(uint32_t first, int step) { return first ^ step * 32; }

}  // namespace linearard::cuda::sm90
