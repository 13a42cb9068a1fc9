#pragma once

#include <pybind11/pybind11.h>

namespace linearard::bindings {

/// Divergence and Reduction as Python enums, and the C++ API as functions: the same entries that C++ programs call.
void register_operators(pybind11::module_& module);

/// build_info(): what the library was built with, and the CUDA devices where the CUDA part was built.
void register_build_info(pybind11::module_& module);

}  // namespace linearard::bindings
