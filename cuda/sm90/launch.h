#pragma once

#include <cuda_runtime_api.h>

#include "../triangular/params.h"

// The triangular relation and two sets on Hopper GPUs (sm_90a): wgmma, and the copy engine for loads and additions.

namespace linearard::cuda {

/// Whether the kernels take a call on the current device: a GPU of compute capability 9.0 that they were compiled for,
/// no mask, one 16-bit type, one dimension, a multiple of 8 of at most 256 (triangular traversal of the backward: of
/// 32, at most 128), one scale, and strides of whole pieces of 16 bytes.
bool sm90_takes(const TriangularForwardParams& params);
bool sm90_takes(const TriangularBackwardParams& params);

/// Errors of the launch; cudaErrorInvalidValue or cudaErrorNotSupported where the driver refuses a tensor map.
cudaError_t launch_triangular_forward_sm90(const TriangularForwardParams& params, cudaStream_t stream);
cudaError_t launch_triangular_backward_sm90(const TriangularBackwardParams& params, cudaStream_t stream);

// --- two sets --------------------------------------------------------------------------------------------------------

/// Likewise for calls of the dense kernels on two sets, without padding and ranges.
bool sm90_takes_sets(const ForwardParams& params);
bool sm90_takes_sets(const BackwardParams& params);

/// @param row_counts, row_lists rows that are left to the dense kernels, as ForwardParams takes them; the counts are
/// zero before. @param ordered row_lists gets 1 or 0 for each row instead, see triangular::order_rows
cudaError_t launch_sets_forward_sm90(
    const ForwardParams& params, int* row_counts, int* row_lists, bool ordered, cudaStream_t stream);

/// Bytes of each of the rows' heads' rows that the backward works on.
inline constexpr int kSetsRowBytes = 16;
/// The gradient of one set, the same bits in every run.
/// @param row_values aligned to 16 bytes
cudaError_t launch_sets_backward_sm90(const BackwardParams& params, void* row_values, cudaStream_t stream);

/// Whether one launch may make the gradients of both sets, of the same call: of a dimension of at most 128, a multiple
/// of 32.
bool sm90_takes_both_sets(const BackwardParams& rows, const BackwardParams& keys);
/// Each pair once; the keys' gradient depends on the order of additions.
/// @param row_values aligned to 16 bytes; @param key_sums [B, key heads, keys, D] likewise
cudaError_t launch_both_sets_backward_sm90(
    const BackwardParams& rows, const BackwardParams& keys, void* row_values, float* key_sums, cudaStream_t stream);

}  // namespace linearard::cuda
