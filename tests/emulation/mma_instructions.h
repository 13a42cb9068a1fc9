#pragma once

#include "copy_async.h"
#include "matrix_instructions.h"

// Twins of cuda/mma/instructions.cuh.

namespace linearard::cuda {

inline void copy_async(uint32_t shared, const void* global, bool valid, LINEARARD_CALLER) {
  emulation::copy_async(shared, global, 16, valid ? 16 : 0, at);
}
inline void copy_async(uint32_t shared, const void* global, LINEARARD_CALLER) {
  emulation::copy_async(shared, global, 16, 16, at);
}
inline void copy_async_8(uint32_t shared, const void* global, bool valid, LINEARARD_CALLER) {
  emulation::copy_async(shared, global, 8, valid ? 8 : 0, at);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int kPending>
void copy_wait() {
  emulation::copy_wait(kPending);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t shared, LINEARARD_CALLER) {
  emulation::load_matrices(r, shared, false, at);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t shared, LINEARARD_CALLER) {
  emulation::load_matrices(r, shared, true, at);
}

inline void store_shared(uint32_t shared, uint32_t value, LINEARARD_CALLER) {
  emulation::write_shared(shared, value, at);
}

inline void reduce_add(float* to, float x) { *to += x; }
inline void reduce_add_two(float* to, float x, float y, LINEARARD_CALLER) {
  if (reinterpret_cast<uintptr_t>(to) % 8 != 0) emulation::fail("red.v2: the address is not a multiple of 8", at);
  to[0] += x;
  to[1] += y;
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LINEARARD_CALLER) {
  emulation::multiply_add<T>(d, a, b0, b1, at);
}

}  // namespace linearard::cuda
