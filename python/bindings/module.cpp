#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ interface of linearard; importing it registers the operators torch.ops.linearard.*";
  linearard::bindings::register_operators(module);
  linearard::bindings::register_build_info(module);
}
