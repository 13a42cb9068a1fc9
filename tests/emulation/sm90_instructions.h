#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_fp16.h>

#include "copy_engine.h"
#include "matrix_instructions.h"
#include "mbarrier.h"
#include "wgmma.h"

// Twins of cuda/sm90/instructions.cuh.

namespace linearard::cuda::sm90 {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals, LINEARARD_CALLER) {
  emulation::mbarrier_init(barrier, arrivals, at);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t barrier, LINEARARD_CALLER) { emulation::mbarrier_arrive(barrier, 0, at); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, LINEARARD_CALLER) {
  emulation::mbarrier_arrive(barrier, bytes, at);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, LINEARARD_CALLER) {
  emulation::mbarrier_wait(barrier, parity, at);
}

inline void barrier_sync(int barrier, int threads, LINEARARD_CALLER) {
  emulation::named_barrier(barrier, threads, true, at);
}
inline void barrier_arrive(int barrier, int threads, LINEARARD_CALLER) {
  emulation::named_barrier(barrier, threads, false, at);
}

inline bool elect_one(LINEARARD_CALLER) {
  int unused = 0;
  emulation::warp_collective("elect.sync", ~0u, false, unused, at, [](auto) {});
  return emulation::this_lane() == 0;
}

// Registers of a thread are not counted.
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline void tma_load_4d(
    uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3, LINEARARD_CALLER) {
  emulation::tma_load(shared, emulation::TensorMap::load(*map), barrier, {c0, c1, c2, c3}, at);
}
inline void prefetch_tensor_map(const CUtensorMap* /*map*/) {}

inline void fence_async_proxy() { emulation::fence_async_proxy(); }

inline void tma_reduce_add_4d(
    const CUtensorMap* map, uint32_t shared, int c0, int c1, int c2, int c3, LINEARARD_CALLER) {
  emulation::tma_reduce_add(emulation::TensorMap::load(*map), shared, {c0, c1, c2, c3}, at);
}
inline void bulk_commit() { emulation::bulk_commit(); }
template <int kPending>
void bulk_wait_read() {
  emulation::bulk_wait_read(kPending);
}

inline void store_matrices(uint32_t shared, const uint32_t (&r)[4], LINEARARD_CALLER) {
  emulation::store_matrices(shared, r, false, at);
}

inline void warpgroup_fence() {}
inline void warpgroup_commit(LINEARARD_CALLER) { emulation::wgmma_commit(at); }
template <int kPending>
void warpgroup_wait(LINEARARD_CALLER) {
  emulation::wgmma_wait(kPending, at);
}
template <int kRegisters>
void pin(float (&d)[kRegisters], LINEARARD_CALLER) {
  emulation::check_done(d, at);
}

template <typename T>
inline constexpr emulation::Element kElementOf =
    std::is_same_v<T, __half> ? emulation::Element::kHalf : emulation::Element::kBFloat16;

template <typename T, bool kTransposeA, bool kTransposeB, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate, LINEARARD_CALLER) {
  emulation::wgmma(d, {kElementOf<T>, 2 * kRegisters, a, b, nullptr, kTransposeA, kTransposeB, accumulate}, at);
}
template <typename T, bool kTransposeB, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate, LINEARARD_CALLER) {
  emulation::wgmma(d, {kElementOf<T>, 2 * kRegisters, 0, b, a, false, kTransposeB, accumulate}, at);
}

}  // namespace linearard::cuda::sm90
