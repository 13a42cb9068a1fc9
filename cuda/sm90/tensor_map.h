#pragma once

#include <cstdint>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../params.h"

// What the copy engine (TMA) knows of a tensor: kernels take it as a __grid_constant__ parameter.

namespace linearard::cuda::sm90 {

/// A tensor of four dimensions, innermost first, the innermost contiguous, and the box that one load brings; elements
/// outside the tensor are read as zeros.
struct TensorShape {
  const void* data;         ///< a multiple of 16 bytes
  bool is_float;            ///< else 16 bits
  uint64_t sizes[4];        ///< elements
  uint64_t byte_strides[3]; ///< of all but the innermost; multiples of 16
  uint32_t box[4];          ///< elements
  bool swizzled;            ///< 128-byte swizzle: the box is 128 bytes wide
};

/// cudaErrorInvalidValue where the driver refuses the tensor, cudaErrorNotSupported where it knows no tensor maps.
cudaError_t encode_tensor_map(CUtensorMap& map, const TensorShape& shape);

/// Vectors [B, heads, tokens, dim] of 16 bits in boxes of 64 tokens x 64 dimensions.
cudaError_t map_vectors(CUtensorMap& map, const Vectors& vectors, int batch, int heads, int tokens);

/// Whether map_vectors can take them: whole pieces of 16 bytes, strides as tensor maps allow.
bool can_map(const Vectors& vectors, int batch, int heads);

/// [heads, tokens] of four floats in boxes of 64 tokens.
cudaError_t map_token_values(CUtensorMap& map, const void* values, int heads, int tokens);

}  // namespace linearard::cuda::sm90
