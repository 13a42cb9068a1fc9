#pragma once

#include <pybind11/pybind11.h>

namespace linearard::bindings {

/// Kernels run for seconds: other Python threads must be able to run meanwhile.
using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

// The C++ API as functions with keyword arguments: the same entries that C++ programs call.
void register_relation(pybind11::module_& module);   ///< relation_kl and its kernels, relation_lse, plan
void register_attention(pybind11::module_& module);  ///< attention_kl and its kernels

/// build_info(): what the library was built with, and the CUDA devices where the CUDA part was built.
void register_build_info(pybind11::module_& module);

}  // namespace linearard::bindings
