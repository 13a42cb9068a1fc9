#include <linearard/layer_relation_kl.h>

#include <torch/library.h>

#include "checks.h"
#include "operators.h"
#include "reduction.h"

namespace linearard {

at::Tensor layer_relation_kl(at::TensorList students, at::TensorList teachers, const RelationOptions& options) {
  constexpr const char* kName = "layer_relation_kl";
  check_relations(kName, students, teachers, options);
  check_frozen(kName, "teachers", teachers);
  TORCH_CHECK(
      options.reduction() != Reduction::kNone, kName,
      ": reduction must be 'sum' or 'mean', got 'none'; layer_relation_kl_forward returns rows, and relation_kl "
      "those of one relation");
  check_reduction(kName, students[0], options.row_weight(), options.reduction(), options.num_items());
  const TensorVector kl = std::get<0>(call_layer_relation_kl_forward(students, teachers, options));
  return reduce_relations(kl, options.key_padding_mask(), options.row_weight(), options.reduction(),
                          options.num_items());
}

ThreeTensorVectors layer_relation_kl_forward(at::TensorList students,
                                             at::TensorList teachers,
                                             const RelationOptions& options) {
  check_relations("layer_relation_kl_forward", students, teachers, options);
  return call_layer_relation_kl_forward(students, teachers, options);
}

TensorVector layer_relation_kl_backward(at::TensorList grad_kl,
                                        at::TensorList students,
                                        at::TensorList teachers,
                                        at::TensorList lse_student,
                                        at::TensorList lse_teacher,
                                        const RelationOptions& options) {
  return call_layer_relation_kl_backward(grad_kl, students, teachers, lse_student, lse_teacher, options);
}

namespace {

at::Tensor layer_relation_kl_operator(at::TensorList students,
                                      at::TensorList teachers,
                                      const OptionalTensor& key_padding_mask,
                                      const OptionalTensor& cu_seqlens,
                                      const OptionalTensor& row_weight,
                                      std::optional<double> scale_student,
                                      std::optional<double> scale_teacher,
                                      bool causal,
                                      std::string_view divergence,
                                      double beta,
                                      std::string_view reduction,
                                      const OptionalTensor& num_items,
                                      std::optional<bool> deterministic) {
  constexpr const char* kName = "layer_relation_kl";
  RelationOptions options = relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                             divergence, beta, deterministic);
  options.row_weight(row_weight).reduction(parse_reduction(reduction, kName)).num_items(num_items);
  return layer_relation_kl(students, teachers, options);
}

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CompositeImplicitAutograd, m) {
  m.impl("layer_relation_kl", &linearard::layer_relation_kl_operator);
}
