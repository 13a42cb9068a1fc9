#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace linearard::cuda {

/// What the choice of tiles depends on, for one GPU.
struct Device {
  std::string name;
  std::string compute_capability;  ///< "9.0"
  int multiprocessors = 0;
  int64_t l2_bytes = 0;
  int64_t shared_memory_bytes_per_block = 0;  ///< the opt-in limit, not the 48 KiB default
  int64_t global_memory_bytes = 0;
};

/// Version of the toolkit that compiled the kernels, "13.0".
std::string toolkit_version();

/// Architectures the kernels were compiled for, separated by commas: "80,90a".
std::string compiled_architectures();

/// The GPUs of this machine in CUDA's order; empty without a GPU or a driver. Throws std::runtime_error with CUDA's
/// message when a GPU is there and cannot be queried.
std::vector<Device> query_devices();

}  // namespace linearard::cuda
