#pragma once

#include <cstdint>

// Which block of threads takes which block of tokens.

namespace linearard::cuda::triangular {

/// Walks of a triangle have different lengths and the hardware hands out blocks of threads in order: the longest walks
/// of all heads come first, so that the short ones fill the end. Many heads are taken in groups that keep every
/// multiprocessor of a large GPU busy several times over.
struct BlockOrder {
  static constexpr int kBlocksOfGroup = 1536;

  int problem;
  int index;  ///< 0 has the longest walk

  /// @param blocks of tokens of a head
  __device__ static BlockOrder of_block(int block, int blocks, int problems) {
    const int groups = max(static_cast<int>(static_cast<int64_t>(blocks) * problems / kBlocksOfGroup), 1);
    const int heads = max((problems + groups - 1) / groups, 1);
    const int64_t group_blocks = static_cast<int64_t>(blocks) * heads;
    const int first = static_cast<int>(block / group_blocks) * heads;
    const int heads_here = min(heads, problems - first);
    const int in_group = static_cast<int>(block - first * static_cast<int64_t>(blocks));
    return {first + in_group % heads_here, in_group / heads_here};
  }
};

}  // namespace linearard::cuda::triangular
