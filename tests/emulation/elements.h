#pragma once

#include <bit>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace linearard::emulation {

/// The value of a 16-bit pattern.
template <typename T>
float to_float(uint16_t bits);

template <>
inline float to_float<__nv_bfloat16>(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

template <>
inline float to_float<__half>(uint16_t bits) {
  return __half2float(std::bit_cast<__half>(bits));
}

}  // namespace linearard::emulation
