#include <optional>
#include <utility>
#include <vector>

#include <linearard/linearard.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace py = pybind11;
using namespace py::literals;

namespace linearard::bindings {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using TensorVector = std::vector<at::Tensor>;

RelationOptions relation_options(OptionalTensor key_padding_mask,
                                 OptionalTensor cu_seqlens,
                                 std::optional<double> scale_student,
                                 std::optional<double> scale_teacher,
                                 bool causal,
                                 Divergence divergence,
                                 double beta,
                                 std::optional<bool> deterministic) {
  return RelationOptions{}
      .key_padding_mask(std::move(key_padding_mask))
      .cu_seqlens(std::move(cu_seqlens))
      .scale_student(scale_student)
      .scale_teacher(scale_teacher)
      .causal(causal)
      .divergence(divergence)
      .beta(beta)
      .deterministic(deterministic);
}

void register_relation_kl(py::module_& module) {
  module.def(
      "relation_kl",
      [](const at::Tensor& student, const at::Tensor& teacher, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, OptionalTensor row_weight, std::optional<double> scale_student,
         std::optional<double> scale_teacher, bool causal, Divergence divergence, double beta, Reduction reduction,
         OptionalTensor num_items, std::optional<bool> deterministic, OptionalTensor lse_teacher) {
        return relation_kl(student, teacher,
                           relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student,
                                            scale_teacher, causal, divergence, beta, deterministic)
                               .row_weight(std::move(row_weight))
                               .reduction(reduction)
                               .num_items(std::move(num_items))
                               .lse_teacher(std::move(lse_teacher)));
      },
      "student"_a, "teacher"_a, py::kw_only(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(),
      "row_weight"_a = py::none(), "scale_student"_a = py::none(), "scale_teacher"_a = py::none(), "causal"_a = false,
      "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5, "reduction"_a = Reduction::kMean,
      "num_items"_a = py::none(), "deterministic"_a = py::none(), "lse_teacher"_a = py::none(), ReleaseGil());
}

void register_relation_kl_forward(py::module_& module) {
  module.def(
      "relation_kl_forward",
      [](const at::Tensor& student, const at::Tensor& teacher, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, std::optional<double> scale_student, std::optional<double> scale_teacher,
         bool causal, Divergence divergence, double beta, std::optional<bool> deterministic,
         OptionalTensor lse_teacher) {
        return relation_kl_forward(student, teacher,
                                   relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student,
                                                    scale_teacher, causal, divergence, beta, deterministic)
                                       .lse_teacher(std::move(lse_teacher)));
      },
      "student"_a, "teacher"_a, py::kw_only(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(),
      "scale_student"_a = py::none(), "scale_teacher"_a = py::none(), "causal"_a = false,
      "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5, "deterministic"_a = py::none(),
      "lse_teacher"_a = py::none(), ReleaseGil());
}

void register_relation_kl_backward(py::module_& module) {
  module.def(
      "relation_kl_backward",
      [](const at::Tensor& grad_kl, const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& lse_student,
         const at::Tensor& lse_teacher, OptionalTensor key_padding_mask, OptionalTensor cu_seqlens,
         std::optional<double> scale_student, std::optional<double> scale_teacher, bool causal, Divergence divergence,
         double beta, std::optional<bool> deterministic) {
        return relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher,
                                    relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student,
                                                     scale_teacher, causal, divergence, beta, deterministic));
      },
      "grad_kl"_a, "student"_a, "teacher"_a, "lse_student"_a, "lse_teacher"_a, py::kw_only(),
      "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(), "scale_student"_a = py::none(),
      "scale_teacher"_a = py::none(), "causal"_a = false, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
      "deterministic"_a = py::none(), ReleaseGil());
}

void register_layer_relation_kl(py::module_& module) {
  module.def(
      "layer_relation_kl",
      [](const TensorVector& students, const TensorVector& teachers, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, OptionalTensor row_weight, std::optional<double> scale_student,
         std::optional<double> scale_teacher, bool causal, Divergence divergence, double beta, Reduction reduction,
         OptionalTensor num_items, std::optional<bool> deterministic) {
        return layer_relation_kl(students, teachers,
                                 relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student,
                                                  scale_teacher, causal, divergence, beta, deterministic)
                                     .row_weight(std::move(row_weight))
                                     .reduction(reduction)
                                     .num_items(std::move(num_items)));
      },
      "students"_a, "teachers"_a, py::kw_only(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(),
      "row_weight"_a = py::none(), "scale_student"_a = py::none(), "scale_teacher"_a = py::none(), "causal"_a = false,
      "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5, "reduction"_a = Reduction::kMean,
      "num_items"_a = py::none(), "deterministic"_a = py::none(), ReleaseGil());
  module.def(
      "layer_relation_kl_forward",
      [](const TensorVector& students, const TensorVector& teachers, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, std::optional<double> scale_student, std::optional<double> scale_teacher,
         bool causal, Divergence divergence, double beta, std::optional<bool> deterministic) {
        return layer_relation_kl_forward(
            students, teachers,
            relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student, scale_teacher, causal,
                             divergence, beta, deterministic));
      },
      "students"_a, "teachers"_a, py::kw_only(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(),
      "scale_student"_a = py::none(), "scale_teacher"_a = py::none(), "causal"_a = false,
      "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5, "deterministic"_a = py::none(), ReleaseGil());
  module.def(
      "layer_relation_kl_backward",
      [](const TensorVector& grad_kl, const TensorVector& students, const TensorVector& teachers,
         const TensorVector& lse_student, const TensorVector& lse_teacher, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, std::optional<double> scale_student, std::optional<double> scale_teacher,
         bool causal, Divergence divergence, double beta, std::optional<bool> deterministic) {
        return layer_relation_kl_backward(
            grad_kl, students, teachers, lse_student, lse_teacher,
            relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student, scale_teacher, causal,
                             divergence, beta, deterministic));
      },
      "grad_kl"_a, "students"_a, "teachers"_a, "lse_student"_a, "lse_teacher"_a, py::kw_only(),
      "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(), "scale_student"_a = py::none(),
      "scale_teacher"_a = py::none(), "causal"_a = false, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
      "deterministic"_a = py::none(), ReleaseGil());
}

void register_relation_lse(py::module_& module) {
  module.def(
      "relation_lse",
      [](const at::Tensor& x, OptionalTensor key_padding_mask, OptionalTensor cu_seqlens, std::optional<double> scale,
         bool causal, std::optional<bool> deterministic) {
        return relation_lse(x, RelationOptions{}
                                   .key_padding_mask(std::move(key_padding_mask))
                                   .cu_seqlens(std::move(cu_seqlens))
                                   .scale_teacher(scale)
                                   .causal(causal)
                                   .deterministic(deterministic));
      },
      "x"_a, py::kw_only(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(), "scale"_a = py::none(),
      "causal"_a = false, "deterministic"_a = py::none(), ReleaseGil());
}

py::dict plan(const at::Tensor& student,
              const at::Tensor& teacher,
              OptionalTensor key_padding_mask,
              OptionalTensor cu_seqlens,
              std::optional<double> scale_student,
              std::optional<double> scale_teacher,
              bool causal,
              Divergence divergence,
              double beta,
              std::optional<bool> deterministic) {
  const ExecutionPlan plan =
      plan_relation_kl(student, teacher,
                       relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student,
                                        scale_teacher, causal, divergence, beta, deterministic));
  return py::dict("backend"_a = plan.backend, "instruction_set"_a = plan.instruction_set,
                  "traversal"_a = plan.traversal, "compute_dtype"_a = plan.compute_dtype,
                  "tile_rows"_a = plan.tile_rows, "tile_columns"_a = plan.tile_columns,
                  "tile_count"_a = plan.tile_count, "threads"_a = plan.threads,
                  "workspace_bytes_forward"_a = plan.workspace_bytes_forward,
                  "workspace_bytes_backward"_a = plan.workspace_bytes_backward, "deterministic"_a = plan.deterministic);
}

void register_plan(py::module_& module) {
  module.def("plan", &plan, "student"_a, "teacher"_a, py::kw_only(), "key_padding_mask"_a = py::none(),
             "cu_seqlens"_a = py::none(), "scale_student"_a = py::none(), "scale_teacher"_a = py::none(),
             "causal"_a = false, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
             "deterministic"_a = py::none(),
             "How relation_kl would execute this call: backend, instruction set, traversal, tiles, workspace bytes.");
}

}  // namespace

void register_relation(py::module_& module) {
  register_relation_kl(module);
  register_relation_kl_forward(module);
  register_relation_kl_backward(module);
  register_layer_relation_kl(module);
  register_relation_lse(module);
  register_plan(module);
}

}  // namespace linearard::bindings
