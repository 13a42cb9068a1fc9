#pragma once

#include <cstdint>

#include <cuda.h>

#include "block.h"

// The copy engine of sm_90 (TMA). Loads land when no thread can go on, in any order where the schedule has a seed;
// additions to global memory read shared memory when their thread waits for that: both as late as the PTX ISA allows.

namespace linearard::emulation {

/// Tensors of the rank and element size that the map was made for; strides in bytes, innermost dimension first.
struct TensorMap {
  static constexpr int kRank = 4;
  const char* data;
  uint32_t element_bytes;
  uint32_t sizes[kRank];
  uint32_t box[kRank];
  uint64_t strides[kRank - 1];
  bool swizzled;  ///< by the 128-byte pattern

  /// Throws Error where the driver would refuse the map.
  void check() const;
  void store(CUtensorMap& to) const;
  static TensorMap load(const CUtensorMap& from);
};

/// The box that begins at these coordinates; elements outside the tensor are zeros. Its bytes count for the mbarrier.
void tma_load(uint32_t shared,
              const TensorMap& map,
              uint32_t barrier,
              const int (&coordinates)[TensorMap::kRank],
              const Location& at);

/// Adds the box of floats to the tensor; elements outside of it are dropped. Part of the thread's next group.
void tma_reduce_add(const TensorMap& map,
                    uint32_t shared,
                    const int (&coordinates)[TensorMap::kRank],
                    const Location& at);
void bulk_commit();
/// Until at most `pending` groups of this thread have not read shared memory.
void bulk_wait_read(int pending);

}  // namespace linearard::emulation
