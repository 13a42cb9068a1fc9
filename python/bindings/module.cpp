#include <linearard/options.h>
#include <linearard/version.h>
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include "bindings.h"

namespace py = pybind11;

namespace linearard::bindings {
namespace {

void register_enums(py::module_& module) {
  py::native_enum<Divergence>(module, "Divergence", "enum.Enum", "Divergence between a teacher row and a student row.")
      .value("FORWARD_KL", Divergence::kForwardKL)
      .value("REVERSE_KL", Divergence::kReverseKL)
      .value("JSD", Divergence::kJSD)
      .finalize();
  py::native_enum<Reduction>(module, "Reduction", "enum.Enum", "What becomes of the values of the rows.")
      .value("NONE", Reduction::kNone)
      .value("SUM", Reduction::kSum)
      .value("MEAN", Reduction::kMean)
      .finalize();
}

}  // namespace
}  // namespace linearard::bindings

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ interface of linearard; importing it registers the operators torch.ops.linearard.*";
  module.attr("__version__") = LINEARARD_VERSION;
  // The enums come first: the functions have members of them as defaults.
  linearard::bindings::register_enums(module);
  linearard::bindings::register_relation(module);
  linearard::bindings::register_attention(module);
  linearard::bindings::register_build_info(module);
}
