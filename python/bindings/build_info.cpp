#include <algorithm>
#include <string>
#include <vector>

#include <linearard/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "build_config.h"

#ifdef LINEARARD_WITH_CUDA
#include "device.h"
#endif

namespace py = pybind11;

namespace linearard::bindings {
namespace {

std::vector<std::string> split(const std::string& list, char separator) {
  std::vector<std::string> items;
  std::string::size_type begin = 0;
  while (begin < list.size()) {
    const auto end = std::min(list.find(separator, begin), list.size());
    items.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return items;
}

py::dict cuda_info() {
  py::dict info;
#ifdef LINEARARD_WITH_CUDA
  info["toolkit"] = cuda::toolkit_version();
  info["architectures"] = split(cuda::compiled_architectures(), ',');
  py::list devices;
  for (const cuda::Device& device : cuda::query_devices()) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = device.compute_capability;
    entry["multiprocessors"] = device.multiprocessors;
    entry["l2_bytes"] = device.l2_bytes;
    entry["shared_memory_bytes_per_block"] = device.shared_memory_bytes_per_block;
    entry["global_memory_bytes"] = device.global_memory_bytes;
    devices.append(entry);
  }
  info["devices"] = devices;
#else
  info["toolkit"] = py::none();
  info["architectures"] = py::list();
  info["devices"] = py::list();
#endif
  return info;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LINEARARD_VERSION;
  info["torch"] = kTorchVersion;
  info["compiler"] = kCompiler;
  info["build_type"] = kBuildType;
  info["compiler_flags"] = kCompilerFlags;
  info["sanitizers"] = split(kSanitizers, ';');
  info["instruction_sets"] = split(kInstructionSets, ';');
  info["cuda"] = cuda_info();
  return info;
}

}  // namespace

void register_build_info(py::module_& module) {
  module.def("build_info", &build_info,
             "What the library was built with: version, torch, compiler, build_type, compiler_flags, sanitizers,\n"
             "instruction_sets (of the CPU tile kernels, best first) and cuda (toolkit, architectures, devices).");
}

}  // namespace linearard::bindings
