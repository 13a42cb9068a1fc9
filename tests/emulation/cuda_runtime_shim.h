#pragma once

// Included before a CUDA source (g++ -include) so that a C++ compiler takes it: CUDA's keywords, built-in variables and
// device functions. See block.h for what the emulation checks.

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "block.h"
#include "shared_memory.h"

#define LINEARARD_EMULATION 1

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __global__
#define __global__
// Blocks run one after the other on one thread: what is static for the thread is the block's own.
#undef __shared__
#define __shared__ thread_local

inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

// --- functions of CUDA's math library that <math.h> lacks ------------------------------------------------------------

using std::max;
using std::min;

inline float __fdividef(float x, float y) { return fabsf(y) > 0x1p126f && isfinite(y) ? 0.f : x / y; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

// --- atomics: a fiber is not interrupted -----------------------------------------------------------------------------

template <typename T>
T atomicAdd(T* to, T x) {
  const T old = *to;
  *to = old + x;
  return old;
}
template <typename T>
T atomicMin(T* to, T x) {
  const T old = *to;
  *to = std::min(old, x);
  return old;
}
template <typename T>
T atomicMax(T* to, T x) {
  const T old = *to;
  *to = std::max(old, x);
  return old;
}
template <typename T>
T atomicOr(T* to, T x) {
  const T old = *to;
  *to = old | x;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- barriers, votes and shuffles ------------------------------------------------------------------------------------

inline void __syncthreads(LINEARARD_CALLER) { linearard::emulation::named_barrier(0, 0, true, at); }

/// Whether the predicate of any thread of the block is not 0.
inline int __syncthreads_or(int predicate, LINEARARD_CALLER) {
  static thread_local int any;  // of the block that runs
  __syncthreads(at);
  any = 0;
  __syncthreads(at);
  any |= predicate;
  __syncthreads(at);
  return any != 0 ? 1 : 0;
}

inline void __syncwarp(uint32_t mask = ~0u, LINEARARD_CALLER) {
  linearard::emulation::warp_collective("__syncwarp", mask, false, mask, at, [](auto) {});
}

namespace linearard::emulation {

/// The predicates of a warp's lanes as bits.
inline uint32_t ballot(const char* what, uint32_t mask, bool predicate, const Location& at) {
  struct Vote {
    bool predicate;
    uint32_t result;
  } vote{predicate, 0};
  warp_collective(what, mask, false, vote, at, [](Vote* const* lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarpSize; ++i)
      if (lanes[i] != nullptr && lanes[i]->predicate) bits |= 1u << i;
    for (int i = 0; i < kWarpSize; ++i)
      if (lanes[i] != nullptr) lanes[i]->result = bits;
  });
  return vote.result;
}

/// The value of the lane that `source` names for each lane; its own where that lies outside its part of the warp.
template <typename T>
T shuffle(const char* what, uint32_t mask, T value, int source, int width, const Location& at) {
  struct Shuffle {
    T value;
    int source;
    T result;
  };
  const int lane = this_lane();
  const int part = lane / width * width;
  Shuffle mine{value, source < part || source >= part + width ? lane : source, value};
  warp_collective(what, mask, false, mine, at, [what, &at](Shuffle* const* lanes) {
    for (int i = 0; i < kWarpSize; ++i) {
      if (lanes[i] == nullptr) continue;
      if (lanes[lanes[i]->source] == nullptr) fail(std::string(what) + " reads a lane that takes no part", at);
      lanes[i]->result = lanes[lanes[i]->source]->value;
    }
  });
  return mine.result;
}

}  // namespace linearard::emulation

inline uint32_t __ballot_sync(uint32_t mask, bool predicate, LINEARARD_CALLER) {
  return linearard::emulation::ballot("__ballot_sync", mask, predicate, at);
}
inline int __all_sync(uint32_t mask, bool predicate, LINEARARD_CALLER) {
  return linearard::emulation::ballot("__all_sync", mask, predicate, at) == mask;
}
inline int __any_sync(uint32_t mask, bool predicate, LINEARARD_CALLER) {
  return linearard::emulation::ballot("__any_sync", mask, predicate, at) != 0;
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, LINEARARD_CALLER) {
  const int lane = linearard::emulation::this_lane() / width * width + source % width;
  return linearard::emulation::shuffle("__shfl_sync", mask, value, lane, width, at);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, LINEARARD_CALLER) {
  const int lane = linearard::emulation::this_lane() ^ lanes;
  return linearard::emulation::shuffle("__shfl_xor_sync", mask, value, lane, width, at);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int lanes, int width = 32, LINEARARD_CALLER) {
  const int lane = linearard::emulation::this_lane() - lanes;
  return linearard::emulation::shuffle("__shfl_up_sync", mask, value, lane, width, at);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int lanes, int width = 32, LINEARARD_CALLER) {
  const int lane = linearard::emulation::this_lane() + lanes;
  return linearard::emulation::shuffle("__shfl_down_sync", mask, value, lane, width, at);
}

inline size_t __cvta_generic_to_shared(const void* pointer, LINEARARD_CALLER) {
  return linearard::emulation::shared_address_of(pointer, at);
}
