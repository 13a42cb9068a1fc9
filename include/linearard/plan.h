#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>

#include <linearard/options.h>

namespace linearard {

/// How a call will be executed: what tests assert and curious users print.
struct ExecutionPlan {
  std::string backend;          ///< "cpu" or "cuda"
  std::string instruction_set;  ///< on the CPU "avx512", "avx2" or "generic"; on CUDA the kind of kernel
  std::string traversal;        ///< "triangular" (each pair of tiles once) or "dense"
  std::string compute_dtype;    ///< of the logits and of all sums in a tile
  int64_t tile_rows = 0;        ///< rows of a tile; on CUDA of the dense kernels, also where triangular ones run first
  int64_t tile_columns = 0;     ///< columns of such a tile
  int64_t tile_count = 0;       ///< tiles that one forward visits, on CUDA that a dense one would
  int64_t threads = 0;          ///< intra-op threads that share them; on CUDA: of a block of the dense kernels
  /// Upper bounds on the memory beyond inputs and outputs (of the backward, for an upstream gradient that float tiles
  /// can hold). What malloc, the matrix library and the threads keep for the next call is not in them.
  int64_t workspace_bytes_forward = 0;
  int64_t workspace_bytes_backward = 0;
  bool deterministic = true;  ///< whether two runs agree bit by bit
};

ExecutionPlan plan_relation_kl(const at::Tensor& student,
                               const at::Tensor& teacher,
                               const RelationOptions& options = {});

}  // namespace linearard
