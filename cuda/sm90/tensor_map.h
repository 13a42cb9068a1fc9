#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../params.h"

// What the copy engine (TMA) knows of a tensor: kernels take it as a __grid_constant__ parameter.

namespace linearard::cuda::sm90 {

/// Vectors [B, heads, tokens, dim] of 16 bits in boxes of 64 tokens x 64 dimensions, zeros outside of the tensor, with
/// the 128-byte swizzle. cudaErrorInvalidValue where the driver refuses them, cudaErrorNotSupported where it knows no
/// tensor maps.
cudaError_t map_vectors(CUtensorMap& map, const Vectors& vectors, int batch, int heads, int tokens);

/// Whether map_vectors can take them: whole pieces of 16 bytes, strides as tensor maps allow.
bool can_map(const Vectors& vectors, int batch, int heads);

/// [heads, tokens] of four floats in boxes of 64 tokens, without a swizzle. Likewise.
cudaError_t map_token_values(CUtensorMap& map, const void* values, int heads, int tokens);

/// Dimensions of a line of 128 bytes.
inline constexpr int kFloatLineDims = 32;

/// [heads, tokens, dim] of floats, contiguous, `dim` a multiple of kFloatLineDims: as [heads][tokens][lines], in boxes
/// of 64 tokens x 2 lines with the 128-byte swizzle. Likewise.
cudaError_t map_gradient(CUtensorMap& map, const float* gradient, int heads, int tokens, int dim);

}  // namespace linearard::cuda::sm90
