#include <cstring>

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "copy_engine.h"

// The few functions of CUDA's runtime and driver that the host code of cuda/ calls, as a GPU of sm_90 would answer.
// Hidden: libraries of torch that the program loads must not find them.

#define LINEARARD_HIDDEN __attribute__((visibility("hidden")))

namespace linearard::emulation {
namespace {

CUresult encode_tiled(CUtensorMap* to,
                      CUtensorMapDataType type,
                      cuuint32_t rank,
                      void* data,
                      const cuuint64_t* sizes,
                      const cuuint64_t* byte_strides,
                      const cuuint32_t* box,
                      const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion /*promotion*/,
                      CUtensorMapFloatOOBfill fill) {
  const bool is_float = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const bool is_16_bit = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ||
                         type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!is_float && !is_16_bit) return CUDA_ERROR_INVALID_VALUE;
  if (rank < 1 || rank > TensorMap::kRank || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE ||
      (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && swizzle != CU_TENSOR_MAP_SWIZZLE_128B)) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  TensorMap map{static_cast<const char*>(data),       is_float ? 4u : 2u, {1, 1, 1, 1}, {1, 1, 1, 1}, {16, 16, 16},
                swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  for (cuuint32_t d = 0; d < rank; ++d) {
    if (element_strides[d] != 1) return CUDA_ERROR_NOT_SUPPORTED;
    if (sizes[d] > UINT32_MAX) return CUDA_ERROR_INVALID_VALUE;
    map.sizes[d] = static_cast<uint32_t>(sizes[d]);
    map.box[d] = box[d];
    if (d > 0) map.strides[d - 1] = byte_strides[d - 1];
  }
  map.check();
  map.store(*to);
  return CUDA_SUCCESS;
}

int attribute(cudaDeviceAttr which) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount:
      return 132;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 227 * 1024;
    default:
      return 0;
  }
}

}  // namespace
}  // namespace linearard::emulation

extern "C" {

LINEARARD_HIDDEN cudaError_t cudaGetDriverEntryPointByVersion(
    const char* symbol, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return cudaErrorNotSupported;
  *function = reinterpret_cast<void*>(&linearard::emulation::encode_tiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

LINEARARD_HIDDEN cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

LINEARARD_HIDDEN cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = linearard::emulation::attribute(which);
  return cudaSuccess;
}

LINEARARD_HIDDEN cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}

}  // extern "C"
