#include "tensor_map.h"

// The driver's part of tensor maps, by its address: a program that links the driver library does not start without a
// driver.

namespace linearard::cuda::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  constexpr unsigned kSinceVersion = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSinceVersion,
                                                             cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

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

}  // namespace linearard::cuda::sm90
