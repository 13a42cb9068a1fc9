#pragma once

#include <cstdint>

#include "block.h"

// wgmma: a warpgroup multiplies 64 x 16 by 16 x N, B and perhaps A in shared memory. A product is computed when its
// warp waits for its group, the last moment that the instruction allows; until then its accumulators hold NaN, and
// shared memory must keep what it will read.

namespace linearard::emulation {

enum class Element { kHalf, kBFloat16 };

struct WgmmaProduct {
  Element element;
  int columns;                ///< N
  uint64_t a;                 ///< descriptor
  uint64_t b;                 ///< descriptor
  const uint32_t* registers;  ///< [4] of A, or null
  bool transpose_a;           ///< rows of A are contiguous in memory, else the 16 that are summed over
  bool transpose_b;           ///< likewise columns of B
  bool accumulate;
};

/// @param d [columns / 2] of this thread, which must stay where they are until the product has been waited for
void wgmma(float* d, const WgmmaProduct& product, const Location& at);
void wgmma_commit(const Location& at);
/// Until at most `pending` groups of this warp are not done.
void wgmma_wait(int pending, const Location& at);
/// Fails where a product into these registers has not been waited for.
void check_done(const float* d, const Location& at);

}  // namespace linearard::emulation
