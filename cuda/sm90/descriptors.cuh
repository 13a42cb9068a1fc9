#pragma once

#include <cstdint>

// Matrices of 16-bit elements in shared memory as the tensor cores read them, with the copy engine's 128-byte swizzle.
//
// A tile of vectors lies there as chunks of 64 dimensions: [chunk][token][64 dimensions]. A token's 64 dimensions are
// a line of 128 bytes, whose pieces of 16 bytes are exchanged by the token's number modulo 8: piece p of token t lies at
// p ^ (t % 8). Eight lines, 1024 bytes, are the unit of the swizzle, and chunks begin at multiples of it.

namespace linearard::cuda::sm90 {

inline constexpr int kChunkDims = 64;
inline constexpr int kLineBytes = 128;
inline constexpr int kSwizzleBytes = 8 * kLineBytes;
/// Dimensions or tokens that one instruction sums over.
inline constexpr int kStep = 16;

/// Bits 0-13 address, 16-29 leading and 32-45 stride offset, all in units of 16 bytes, 62-63 the swizzle.
__device__ inline uint64_t matrix_descriptor(uint32_t shared, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride_bytes / 16) << 32 |
         static_cast<uint64_t>(leading_bytes / 16) << 16 | (shared & 0x3ffffu) >> 4;
}

/// Tokens x dimensions, summed over 16 dimensions of each token ("K-major"): S = X_I X_J^T. @param shared the first
/// token's line in chunk 0, @param chunk_bytes from one chunk to the next. The leading offset is not used.
template <int kChunkBytes>
__device__ uint64_t vectors_descriptor(uint32_t shared, int step) {
  constexpr int kStepsOfChunk = kChunkDims / kStep;
  return matrix_descriptor(shared + step / kStepsOfChunk * kChunkBytes + step % kStepsOfChunk * kStep * 2, 16,
                           kSwizzleBytes);
}

/// Dimensions x tokens, summed over 16 tokens ("MN-major"): X_J in H X_J. The stride goes to the next eight tokens, the
/// leading offset to the next 64 dimensions.
template <int kChunkBytes>
__device__ uint64_t transposed_descriptor(uint32_t shared, int step) {
  return matrix_descriptor(shared + step * kStep * kLineBytes, kChunkBytes, kSwizzleBytes);
}

/// Where piece `piece` of 16 bytes of a token's line lies.
__device__ inline uint32_t swizzled(uint32_t chunk, int token, int piece) {
  return chunk + token * kLineBytes + ((piece ^ (token & 7)) << 4);
}

}  // namespace linearard::cuda::sm90
