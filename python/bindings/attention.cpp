#include <optional>
#include <utility>

#include <linearard/attention_kl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"

namespace py = pybind11;
using namespace py::literals;

namespace linearard::bindings {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

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

void register_attention_kl(py::module_& module) {
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

void register_attention_kl_forward(py::module_& module) {
  module.def(
      "attention_kl_forward",
      [](const at::Tensor& query_student, const at::Tensor& key_student, const at::Tensor& query_teacher,
         const at::Tensor& key_teacher, OptionalTensor query_padding_mask, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, OptionalTensor cu_seqlens_key, std::optional<double> scale_student,
         std::optional<double> scale_teacher, bool causal, Divergence divergence, double beta,
         std::optional<bool> deterministic) {
        return attention_kl_forward(query_student, key_student, query_teacher, key_teacher,
                                    attention_options(std::move(query_padding_mask), std::move(key_padding_mask),
                                                      std::move(cu_seqlens), std::move(cu_seqlens_key), scale_student,
                                                      scale_teacher, causal, divergence, beta, deterministic));
      },
      "query_student"_a, "key_student"_a, "query_teacher"_a, "key_teacher"_a, py::kw_only(),
      "query_padding_mask"_a = py::none(), "key_padding_mask"_a = py::none(), "cu_seqlens"_a = py::none(),
      "cu_seqlens_key"_a = py::none(), "scale_student"_a = py::none(), "scale_teacher"_a = py::none(),
      "causal"_a = true, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5, "deterministic"_a = py::none(),
      ReleaseGil());
}

void register_attention_kl_backward(py::module_& module) {
  module.def(
      "attention_kl_backward",
      [](const at::Tensor& grad_kl, const at::Tensor& query_student, const at::Tensor& key_student,
         const at::Tensor& query_teacher, const at::Tensor& key_teacher, const at::Tensor& lse_student,
         const at::Tensor& lse_teacher, OptionalTensor query_padding_mask, OptionalTensor key_padding_mask,
         OptionalTensor cu_seqlens, OptionalTensor cu_seqlens_key, std::optional<double> scale_student,
         std::optional<double> scale_teacher, bool causal, Divergence divergence, double beta,
         std::optional<bool> deterministic) {
        return attention_kl_backward(grad_kl, query_student, key_student, query_teacher, key_teacher, lse_student,
                                     lse_teacher,
                                     attention_options(std::move(query_padding_mask), std::move(key_padding_mask),
                                                       std::move(cu_seqlens), std::move(cu_seqlens_key), scale_student,
                                                       scale_teacher, causal, divergence, beta, deterministic));
      },
      "grad_kl"_a, "query_student"_a, "key_student"_a, "query_teacher"_a, "key_teacher"_a, "lse_student"_a,
      "lse_teacher"_a, py::kw_only(), "query_padding_mask"_a = py::none(), "key_padding_mask"_a = py::none(),
      "cu_seqlens"_a = py::none(), "cu_seqlens_key"_a = py::none(), "scale_student"_a = py::none(),
      "scale_teacher"_a = py::none(), "causal"_a = true, "divergence"_a = Divergence::kForwardKL, "beta"_a = 0.5,
      "deterministic"_a = py::none(), ReleaseGil());
}

}  // namespace

void register_attention(py::module_& module) {
  register_attention_kl(module);
  register_attention_kl_forward(module);
  register_attention_kl_backward(module);
}

}  // namespace linearard::bindings
