#include <optional>

#include <linearard/linearard.h>
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace py = pybind11;
using namespace py::literals;

namespace linearard::bindings {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Kernels run for seconds: other Python threads must be able to run meanwhile.
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

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

void register_relation(py::module_& module) {
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

  module.def(
      "relation_kl_backward",
      [](const at::Tensor& grad_kl, const at::Tensor& student, const at::Tensor& teacher,
         const at::Tensor& lse_student, const at::Tensor& lse_teacher, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, std::optional<double> scale_student, std::optional<double> scale_teacher,
         bool causal, Divergence divergence, double beta, std::optional<bool> deterministic) {
        return relation_kl_backward(grad_kl, student, teacher, lse_student, lse_teacher,
                                    relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student,
                                                     scale_teacher, causal, divergence, beta, deterministic));
      },
      "grad_kl"_a, "student"_a, "teacher"_a, "lse_student"_a, "lse_teacher"_a, py::kw_only(),
      "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(), "scale_student"_a = py::none(),
      "scale_teacher"_a = py::none(), "causal"_a = false, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
      "deterministic"_a = py::none(), ReleaseGil());

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

AttentionOptions attention_options(OptionalTensor query_padding_mask,
                                   OptionalTensor key_padding_mask,
                                   OptionalTensor cu_seqlens,
                                   OptionalTensor cu_seqlens_key,
                                   std::optional<double> scale_student,
                                   std::optional<double> scale_teacher,
                                   bool causal,
                                   Divergence divergence,
                                   double beta,
                                   std::optional<bool> deterministic) {
  return AttentionOptions{}
      .query_padding_mask(std::move(query_padding_mask))
      .key_padding_mask(std::move(key_padding_mask))
      .cu_seqlens(std::move(cu_seqlens))
      .cu_seqlens_key(std::move(cu_seqlens_key))
      .scale_student(scale_student)
      .scale_teacher(scale_teacher)
      .causal(causal)
      .divergence(divergence)
      .beta(beta)
      .deterministic(deterministic);
}

void register_attention(py::module_& module) {
  module.def(
      "attention_kl",
      [](const at::Tensor& query_student, const at::Tensor& key_student, const at::Tensor& query_teacher,
         const at::Tensor& key_teacher, OptionalTensor query_padding_mask, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, OptionalTensor cu_seqlens_key, OptionalTensor row_weight,
         std::optional<double> scale_student, std::optional<double> scale_teacher, bool causal, Divergence divergence,
         double beta, Reduction reduction, OptionalTensor num_items, std::optional<bool> deterministic) {
        return attention_kl(query_student, key_student, query_teacher, key_teacher,
                            attention_options(std::move(query_padding_mask), std::move(key_padding_mask),
                                              std::move(cu_seqlens), std::move(cu_seqlens_key), scale_student,
                                              scale_teacher, causal, divergence, beta, deterministic)
                                .row_weight(std::move(row_weight))
                                .reduction(reduction)
                                .num_items(std::move(num_items)));
      },
      "query_student"_a, "key_student"_a, "query_teacher"_a, "key_teacher"_a, py::kw_only(),
      "query_padding_mask"_a = py::none(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(),
      "cu_seqlens_key"_a = py::none(), "row_weight"_a = py::none(), "scale_student"_a = py::none(),
      "scale_teacher"_a = py::none(), "causal"_a = true, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
      "reduction"_a = Reduction::kMean, "num_items"_a = py::none(), "deterministic"_a = py::none(), ReleaseGil());
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
  const ExecutionPlan plan = plan_relation_kl(
      student, teacher,
      relation_options(std::move(key_padding_mask), std::move(cu_seqlens), scale_student, scale_teacher, causal,
                       divergence, beta, deterministic));
  return py::dict("backend"_a = plan.backend, "instruction_set"_a = plan.instruction_set,
                  "traversal"_a = plan.traversal, "compute_dtype"_a = plan.compute_dtype,
                  "tile_rows"_a = plan.tile_rows, "tile_columns"_a = plan.tile_columns,
                  "tile_count"_a = plan.tile_count, "threads"_a = plan.threads,
                  "workspace_bytes_forward"_a = plan.workspace_bytes_forward,
                  "workspace_bytes_backward"_a = plan.workspace_bytes_backward,
                  "deterministic"_a = plan.deterministic);
}

void register_plan(py::module_& module) {
  module.def("plan", &plan, "student"_a, "teacher"_a, py::kw_only(), "key_padding_mask"_a = py::none(),
             "cu_seqlens"_a = py::none(), "scale_student"_a = py::none(), "scale_teacher"_a = py::none(),
             "causal"_a = false, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
             "deterministic"_a = py::none(),
             "How relation_kl would execute this call: backend, instruction set, traversal, tiles, workspace bytes.");
}

}  // namespace

void register_operators(py::module_& module) {
  register_enums(module);
  register_relation(module);
  register_attention(module);
  register_plan(module);
}

}  // namespace linearard::bindings
