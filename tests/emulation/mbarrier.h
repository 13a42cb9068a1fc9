#pragma once

#include <cstdint>

#include "block.h"

// mbarriers: 8 bytes of shared memory each, whose phases end when enough threads have arrived and the expected bytes
// have landed.

namespace linearard::emulation {

void mbarrier_init(uint32_t barrier, uint32_t arrivals, const Location& at);
/// @param expected_bytes that this phase waits for as well
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, const Location& at);
/// Bytes of an asynchronous copy have landed. @param at of the copy
void mbarrier_complete(uint32_t barrier, uint32_t bytes, const Location& at);
/// Until the phase of this parity has ended.
void mbarrier_wait(uint32_t barrier, uint32_t parity, const Location& at);

}  // namespace linearard::emulation
