#pragma once

#include <optional>
#include <utility>

#include <ATen/core/Tensor.h>

#include <cuda_runtime_api.h>
#include <params.h>

#include "arguments.h"

// The bridge from tensors to the parameters of the kernels in cuda/.

namespace linearard::cuda {

/// The current stream, through c10's device interface: the library does not link torch's CUDA libraries.
cudaStream_t current_stream(const at::Device& device);

/// A clear error where a launch failed; `action` says which.
void check_launch(cudaError_t error, const char* action, const at::Device& device);

/// A tensor [B, heads, n, D] for a problem with `heads` heads of rows.
Vectors vectors_of(const at::Tensor& tensor, int64_t heads);

/// A size that the kernels count in 32 bits.
int narrow(int64_t size);

/// What the rows of a call see, with the memory that it refers to.
struct VisibilityMemory {
  Visibility visibility{};
  at::Tensor row_mask;
  at::Tensor key_mask;
  at::Tensor ranges;
};

struct VisibilityOptions {
  int64_t batch;
  int64_t rows;
  int64_t keys;
  bool causal;
  std::optional<at::Tensor> row_mask;        ///< [B, rows] bool
  std::optional<at::Tensor> key_mask;        ///< [B, keys] bool
  std::optional<at::Tensor> row_boundaries;  ///< [S + 1]
  std::optional<at::Tensor> key_boundaries;
};
VisibilityMemory visibility_of(const VisibilityOptions& options, const at::Device& device);

/// How many marks of blocks that float could not hold a call has.
int64_t mark_count(int64_t heads, int64_t rows);
/// The marks, all clear.
at::Tensor clear_marks(int64_t heads, int64_t rows, const at::Device& device);

/// The same values, contiguous, of another dtype: a view or a copy, never more than the call must.
inline at::Tensor contiguous_as(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.to(dtype).contiguous();
}

}  // namespace linearard::cuda
