#include "tensor_map.h"

#include <cstdint>

#include "schedule.cuh"

namespace linearard::cuda::sm90 {
namespace {

constexpr int kChunk = 64;
constexpr uint64_t kElementBytes = 2;
constexpr uint64_t kLargestStride = uint64_t{1} << 40;

/// A tensor of four dimensions, innermost first, the innermost contiguous, and the box that one load brings; elements
/// outside the tensor are read as zeros.
struct TensorShape {
  const void* data;          ///< a multiple of 16 bytes
  bool is_float;             ///< else 16 bits
  uint64_t sizes[4];         ///< elements
  uint64_t byte_strides[3];  ///< of all but the innermost; multiples of 16
  uint32_t box[4];           ///< elements
  bool swizzled;             ///< 128-byte swizzle: the box is 128 bytes wide
};

/// A dimension of one element is never stepped over: its stride may be anything.
uint64_t byte_stride(int64_t elements, int size) {
  return size > 1 ? static_cast<uint64_t>(elements) * kElementBytes : 16;
}

bool is_valid_stride(int64_t elements, int size) {
  return size <= 1 ||
         (elements > 0 && byte_stride(elements, size) % 16 == 0 && byte_stride(elements, size) < kLargestStride);
}

/// The driver's function, by its name: a program that links the driver library does not start without a driver.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  constexpr unsigned kSinceVersion = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSinceVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

cudaError_t encode_tensor_map(CUtensorMap& map, const TensorShape& shape) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr uint32_t kSteps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, shape.is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
             const_cast<void*>(shape.data), shape.sizes, shape.byte_strides, shape.box, kSteps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, shape.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

bool can_map(const Vectors& v, int batch, int heads) {
  return v.aligned && v.group == 1 && is_valid_stride(v.batch_stride, batch) && is_valid_stride(v.head_stride, heads) &&
         is_valid_stride(v.token_stride, 2);
}

cudaError_t map_vectors(CUtensorMap& map, const Vectors& v, int batch, int heads, int tokens) {
  return encode_tensor_map(map, {v.data,
                                 false,
                                 {static_cast<uint64_t>(v.dim), static_cast<uint64_t>(tokens),
                                  static_cast<uint64_t>(heads), static_cast<uint64_t>(batch)},
                                 {byte_stride(v.token_stride, tokens), byte_stride(v.head_stride, heads),
                                  byte_stride(v.batch_stride, batch)},
                                 {kChunk, kTileTokens, 1, 1},
                                 true});
}

cudaError_t map_token_values(CUtensorMap& map, const void* values, int heads, int tokens) {
  constexpr uint64_t kBytes = 4 * sizeof(float);
  const uint64_t head_bytes = static_cast<uint64_t>(tokens) * kBytes;
  return encode_tensor_map(map, {values,
                                 true,
                                 {4, static_cast<uint64_t>(tokens), static_cast<uint64_t>(heads), 1},
                                 {kBytes, head_bytes, head_bytes * static_cast<uint64_t>(heads)},
                                 {4, kTileTokens, 1, 1},
                                 false});
}

cudaError_t map_gradient(CUtensorMap& map, const float* gradient, int heads, int tokens, int dim) {
  const auto lines = static_cast<uint64_t>(dim / kFloatLineDims);
  const uint64_t token_bytes = static_cast<uint64_t>(dim) * sizeof(float);
  return encode_tensor_map(map,
                           {gradient,
                            true,
                            {kFloatLineDims, lines, static_cast<uint64_t>(tokens), static_cast<uint64_t>(heads)},
                            {kFloatLineDims * sizeof(float), token_bytes, token_bytes * static_cast<uint64_t>(tokens)},
                            {kFloatLineDims, kChunk / kFloatLineDims, kTileTokens, 1},
                            true});
}

}  // namespace linearard::cuda::sm90
