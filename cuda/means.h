#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

// Means of several lists of numbers by one launch, or two where a list is long.

namespace linearard::cuda {

inline constexpr int kLargestMeans = 32;
inline constexpr int kMeanPartials = 256;

/// The mean of each list, summed in double in an order that does not change.
struct MeansParams {
  int lists;
  Scalar type;  ///< kFloat or kDouble, of the results as well
  const void* values[kLargestMeans];
  int64_t counts[kLargestMeans];
  double* partial;       ///< [lists, kMeanPartials]
  void* means;           ///< [lists], cut to the largest finite value
  void* inverse_counts;  ///< [lists] 1 / count; null: not wanted
};

cudaError_t means(const MeansParams& params, cudaStream_t stream);

/// One number divided by another.
struct QuotientParams {
  Scalar type;  ///< kFloat or kDouble, of the result as well
  const void* number;
  double divisor;
  void* result;
};

cudaError_t quotient(const QuotientParams& params, cudaStream_t stream);

}  // namespace linearard::cuda
