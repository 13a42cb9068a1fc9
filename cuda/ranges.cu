#include "common/launch.cuh"
#include "launch.h"

namespace linearard::cuda {
namespace {

/// Number of the sequence that a position lies in.
__device__ int sequence_of(const int64_t* boundaries, int sequences, int position) {
  int low = 0;
  int high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (boundaries[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Sequence {
  int row_begin;
  int row_end;
  int key_begin;
  int key_end;
};

__device__ Sequence bounds_of(const RangeParams& p, const int64_t* boundaries, int position) {
  if (p.row_boundaries == nullptr) return {0, p.rows, 0, p.keys};
  const int s = sequence_of(boundaries, p.sequences, position);
  return {static_cast<int>(p.row_boundaries[s]), static_cast<int>(p.row_boundaries[s + 1]),
          static_cast<int>(p.key_boundaries[s]), static_cast<int>(p.key_boundaries[s + 1])};
}

__device__ Range keys_seen(const RangeParams& p, int batch, int row) {
  if (p.row_mask != nullptr && p.row_mask[static_cast<int64_t>(batch) * p.rows + row] == 0) return {0, 0, 0};
  const Sequence s = bounds_of(p, p.row_boundaries, row);
  Range range{s.key_begin, s.key_end, 0};
  if (p.causal) {
    // Aligned to the bottom right of the sequence; positions count padding.
    const int last = row - s.row_begin + (s.key_end - s.key_begin) - (s.row_end - s.row_begin);
    range.end = min(s.key_end, s.key_begin + max(0, last + 1));
  }
  range.count = range.end - range.begin;
  if (p.key_prefix != nullptr) {
    const int* prefix = p.key_prefix + static_cast<int64_t>(batch) * (p.keys + 1);
    range.count = prefix[range.end] - prefix[range.begin];
  }
  return range;
}

__device__ Range rows_that_see(const RangeParams& p, int key) {
  const Sequence s = bounds_of(p, p.key_boundaries, key);
  Range range{s.row_begin, s.row_end, 0};
  if (p.causal) {
    const int first = key - s.key_begin - (s.key_end - s.key_begin) + (s.row_end - s.row_begin);
    range.begin = min(s.row_end, s.row_begin + max(0, first));
  }
  range.count = range.end - range.begin;
  return range;
}

__global__ void ranges_kernel(const __grid_constant__ RangeParams p) {
  const int64_t tokens = static_cast<int64_t>(p.rows) + p.keys;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= tokens * p.batch) return;
  const int batch = static_cast<int>(index / tokens);
  const int token = static_cast<int>(index % tokens);
  if (token < p.rows) {
    p.row_ranges[static_cast<int64_t>(batch) * p.rows + token] = keys_seen(p, batch, token);
  } else {
    p.key_ranges[static_cast<int64_t>(batch) * p.keys + token - p.rows] = rows_that_see(p, token - p.rows);
  }
}

}  // namespace

cudaError_t compute_ranges(const RangeParams& params, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t tokens = (static_cast<int64_t>(params.rows) + params.keys) * params.batch;
  if (tokens == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((tokens + kThreads - 1) / kThreads));
  return launch_kernel(ranges_kernel, grid, kThreads, 0, stream, params);
}

}  // namespace linearard::cuda
