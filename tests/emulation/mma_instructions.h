#pragma once

#include "copy_async.h"
#include "matrix_instructions.h"

// Twins of cuda/mma/instructions.cuh.

namespace linearard::cuda {

inline void copy_async(uint32_t shared, const void* global, bool valid, LINEARARD_CALLER) {
  emulation::copy_async(shared, global, valid ? 16 : 0, at);
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

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, LINEARARD_CALLER) {
  emulation::multiply_add<T>(d, a, b0, b1, at);
}

}  // namespace linearard::cuda
