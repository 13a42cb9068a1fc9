#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../triangular/params.h"
#include "rows.h"

// The kernels that exist: each is instantiated in a file of its own in cuda/instantiations.

#define LINEARARD_FOR_EACH_SM90_FORWARD(macro, T) macro(T, 64) macro(T, 128) macro(T, 256)
#define LINEARARD_FOR_EACH_SM90_BACKWARD(macro, T) macro(T, 64) macro(T, 128)
#define LINEARARD_FOR_EACH_SM90_ROWS(macro, T) macro(T, 64) macro(T, 128) macro(T, 256)

namespace linearard::cuda::sm90 {

inline constexpr int kLargestForwardDim = 256;
inline constexpr int kLargestBackwardDim = 128;
inline constexpr int kLargestRowsDim = 256;

template <typename T, int kDim>
cudaError_t launch_forward(const TriangularForwardParams& params, int multiprocessors, cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_backward(const TriangularBackwardParams& params, int multiprocessors, cudaStream_t stream);
/// Traversal::kRows.
template <typename T, int kDim>
cudaError_t launch_rows_forward(const TriangularForwardParams& params, int multiprocessors, cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_rows_backward(const TriangularBackwardParams& params, int multiprocessors, cudaStream_t stream);

/// Of two sets.
template <typename T, int kDim>
cudaError_t launch_pairs_forward(const RowsForwardParams& params, int multiprocessors, cudaStream_t stream);
template <typename T, int kDim>
cudaError_t launch_pairs_backward(const RowsBackwardParams& p, Pairs pairs, int multiprocessors, cudaStream_t stream);
/// The gradients of both, each pair once: writes that of the rows and adds to `key_sums` [B, heads / group, others, D]
/// those of the keys, without the scale; zero before.
/// @param p of the rows
template <typename T, int kDim>
cudaError_t launch_sets_backward(const RowsBackwardParams& p,
                                 float* key_sums,
                                 int multiprocessors,
                                 cudaStream_t stream);

#define LINEARARD_FORWARD(T, kDim) \
  extern template cudaError_t launch_forward<T, kDim>(const TriangularForwardParams&, int, cudaStream_t);
#define LINEARARD_BACKWARD(T, kDim)                                                                         \
  extern template cudaError_t launch_backward<T, kDim>(const TriangularBackwardParams&, int, cudaStream_t); \
  extern template cudaError_t launch_sets_backward<T, kDim>(const RowsBackwardParams&, float*, int, cudaStream_t);
#define LINEARARD_ROWS(T, kDim)                                                                                  \
  extern template cudaError_t launch_rows_forward<T, kDim>(const TriangularForwardParams&, int, cudaStream_t);   \
  extern template cudaError_t launch_rows_backward<T, kDim>(const TriangularBackwardParams&, int, cudaStream_t); \
  extern template cudaError_t launch_pairs_forward<T, kDim>(const RowsForwardParams&, int, cudaStream_t);        \
  extern template cudaError_t launch_pairs_backward<T, kDim>(const RowsBackwardParams&, Pairs, int, cudaStream_t);
LINEARARD_FOR_EACH_SM90_FORWARD(LINEARARD_FORWARD, __half)
LINEARARD_FOR_EACH_SM90_FORWARD(LINEARARD_FORWARD, __nv_bfloat16)
LINEARARD_FOR_EACH_SM90_BACKWARD(LINEARARD_BACKWARD, __half)
LINEARARD_FOR_EACH_SM90_BACKWARD(LINEARARD_BACKWARD, __nv_bfloat16)
LINEARARD_FOR_EACH_SM90_ROWS(LINEARARD_ROWS, __half)
LINEARARD_FOR_EACH_SM90_ROWS(LINEARARD_ROWS, __nv_bfloat16)
#undef LINEARARD_FORWARD
#undef LINEARARD_BACKWARD
#undef LINEARARD_ROWS

}  // namespace linearard::cuda::sm90
