#pragma once

#include "../params.h"

namespace linearard::cuda {

/// Keys that row `row` of batch entry `batch` sees.
__device__ inline Range keys_of_row(const Visibility& v, int batch, int row) {
  if (row >= v.rows) return {0, 0, 0};
  if (v.row_ranges != nullptr) return v.row_ranges[static_cast<int64_t>(batch) * v.rows + row];
  int end = v.keys;
  if (v.causal) end = max(0, min(v.keys, row + 1 + v.keys - v.rows));
  return {0, end, end};
}

/// Rows that may see key `key`.
__device__ inline Range rows_of_key(const Visibility& v, int batch, int key) {
  if (key >= v.keys) return {0, 0, 0};
  if (v.key_ranges != nullptr) return v.key_ranges[static_cast<int64_t>(batch) * v.keys + key];
  const int begin = v.causal ? min(v.rows, max(0, key - (v.keys - v.rows))) : 0;
  return {begin, v.rows, v.rows - begin};
}

__device__ inline bool is_real(const uint8_t* mask, int count, int batch, int token) {
  return token < count && (mask == nullptr || mask[static_cast<int64_t>(batch) * count + token] != 0);
}

/// Where the vectors of one head begin.
template <typename T>
__device__ const T* head_of(const Vectors& v, int batch, int head) {
  return static_cast<const T*>(v.data) + batch * v.batch_stride + (head / v.group) * v.head_stride;
}

/// The smallest range that contains those of all threads of a block with something to see; empty where none has.
/// `scratch` holds 2 ints of shared memory.
__device__ inline Range union_of_block(Range mine, int* scratch) {
  if (threadIdx.x == 0) {
    scratch[0] = INT32_MAX;
    scratch[1] = 0;
  }
  __syncthreads();
  if (mine.end > mine.begin) {
    atomicMin(&scratch[0], mine.begin);
    atomicMax(&scratch[1], mine.end);
  }
  __syncthreads();
  const Range all{min(scratch[0], scratch[1]), scratch[1], 0};
  __syncthreads();
  return all;
}

__device__ inline void mark_redo(RedoMarks redo, int64_t head, int row, int rows) {
  redo[0] = 1;
  redo[1 + head * ((rows + kRedoRows - 1) / kRedoRows) + row / kRedoRows] = 1;
}

}  // namespace linearard::cuda
