#include "device.h"

#include <stdexcept>

#include <cuda_runtime.h>

namespace linearard::cuda {
namespace {

void check(cudaError_t status, const char* action) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("linearard: ") + action + ": " + cudaGetErrorString(status));
  }
}

int64_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "querying a CUDA device");
  return value;
}

}  // namespace

std::string toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string compiled_architectures() { return LINEARARD_CUDA_ARCHITECTURES; }

std::vector<Device> query_devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    // The error is an answer here; left in place it would surface at the next launch of somebody else.
    cudaGetLastError();
    return {};
  }
  check(status, "counting CUDA devices");

  std::vector<Device> devices;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index), "querying a CUDA device");
    Device device;
    device.name = properties.name;
    device.compute_capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    device.multiprocessors = properties.multiProcessorCount;
    device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
    device.shared_memory_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    device.global_memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    devices.push_back(device);
  }
  return devices;
}

}  // namespace linearard::cuda
