#pragma once

#include <cstdint>

#include "block.h"

// cp.async: 4, 8 or 16 bytes from global to shared memory. A copy is performed when its thread waits for its group, the
// last moment that the instruction allows; until then the destination must not be touched.

namespace linearard::emulation {

/// @param size of the destination, @param bytes of the source, 0 to `size`; zeros follow
void copy_async(uint32_t shared, const void* global, int size, int bytes, const Location& at);
void copy_commit();
/// Until at most `pending` groups of this thread are under way.
void copy_wait(int pending);

}  // namespace linearard::emulation
