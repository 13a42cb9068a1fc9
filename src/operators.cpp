#include "operators.h"

#include <initializer_list>
#include <string>
#include <utility>

#include <ATen/core/dispatch/Dispatcher.h>

namespace linearard {
namespace {

template <typename Signature>
auto typed_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// The dispatcher cannot say more of an undefined tensor than that it has no device.
void check_defined(const char* operator_name,
                   std::initializer_list<std::pair<const char*, const at::Tensor*>> arguments) {
  for (const auto& [name, tensor] : arguments) {
    TORCH_CHECK(tensor->defined(), operator_name, ": ", name, " must be a tensor, got an undefined one");
  }
}

}  // namespace

ThreeTensors call_relation_kl_forward(const at::Tensor& student, const at::Tensor& teacher, const RelationOptions& o) {
  check_defined("relation_kl_forward", {{"student", &student}, {"teacher", &teacher}});
  static const auto op = typed_operator<RelationForwardSignature>("linearard::relation_kl_forward");
  return op.call(student, teacher, o.key_padding_mask(), o.cu_seqlens(), o.scale_student(), o.scale_teacher(),
                 o.causal(), to_string(o.divergence()), o.beta(), o.deterministic(), o.lse_teacher());
}

at::Tensor call_relation_kl_backward(const at::Tensor& grad_kl,
                                     const at::Tensor& student,
                                     const at::Tensor& teacher,
                                     const at::Tensor& lse_student,
                                     const at::Tensor& lse_teacher,
                                     const RelationOptions& o) {
  static const auto op = typed_operator<RelationBackwardSignature>("linearard::relation_kl_backward");
  return op.call(grad_kl, student, teacher, lse_student, lse_teacher, o.key_padding_mask(), o.cu_seqlens(),
                 o.scale_student(), o.scale_teacher(), o.causal(), to_string(o.divergence()), o.beta(),
                 o.deterministic());
}

ThreeTensorVectors call_layer_relation_kl_forward(at::TensorList students,
                                                  at::TensorList teachers,
                                                  const RelationOptions& o) {
  static const auto op = typed_operator<LayerForwardSignature>("linearard::layer_relation_kl_forward");
  return op.call(students, teachers, o.key_padding_mask(), o.cu_seqlens(), o.scale_student(), o.scale_teacher(),
                 o.causal(), to_string(o.divergence()), o.beta(), o.deterministic());
}

TensorVector call_layer_relation_kl_backward(at::TensorList grad_kl,
                                             at::TensorList students,
                                             at::TensorList teachers,
                                             at::TensorList lse_student,
                                             at::TensorList lse_teacher,
                                             const RelationOptions& o) {
  static const auto op = typed_operator<LayerBackwardSignature>("linearard::layer_relation_kl_backward");
  return op.call(grad_kl, students, teachers, lse_student, lse_teacher, o.key_padding_mask(), o.cu_seqlens(),
                 o.scale_student(), o.scale_teacher(), o.causal(), to_string(o.divergence()), o.beta(),
                 o.deterministic());
}

at::Tensor call_mean_of_rows(const at::Tensor& kl) {
  static const auto op = typed_operator<at::Tensor(const at::Tensor&)>("linearard::mean_of_rows");
  return op.call(kl);
}

at::Tensor call_mean_of_rows_backward(const at::Tensor& grad, const c10::SymInt& count) {
  static const auto op = typed_operator<at::Tensor(const at::Tensor&, c10::SymInt)>("linearard::mean_of_rows_backward");
  return op.call(grad, count);
}

TwoTensors call_means_of_rows(at::TensorList kl) {
  static const auto op = typed_operator<TwoTensors(at::TensorList)>("linearard::means_of_rows");
  return op.call(kl);
}

at::Tensor call_relation_lse(const at::Tensor& x, const RelationOptions& o) {
  check_defined("relation_lse", {{"x", &x}});
  static const auto op = typed_operator<RelationLseSignature>("linearard::relation_lse");
  return op.call(x, o.key_padding_mask(), o.cu_seqlens(), o.scale_teacher(), o.causal(), o.deterministic());
}

ThreeTensors call_attention_kl_forward(const at::Tensor& query_student,
                                       const at::Tensor& key_student,
                                       const at::Tensor& query_teacher,
                                       const at::Tensor& key_teacher,
                                       const AttentionOptions& o) {
  check_defined("attention_kl_forward", {{"query_student", &query_student},
                                         {"key_student", &key_student},
                                         {"query_teacher", &query_teacher},
                                         {"key_teacher", &key_teacher}});
  static const auto op = typed_operator<AttentionForwardSignature>("linearard::attention_kl_forward");
  return op.call(query_student, key_student, query_teacher, key_teacher, o.query_padding_mask(), o.key_padding_mask(),
                 o.cu_seqlens(), o.cu_seqlens_key(), o.scale_student(), o.scale_teacher(), o.causal(),
                 to_string(o.divergence()), o.beta(), o.deterministic());
}

TwoTensors call_attention_kl_backward(const at::Tensor& grad_kl,
                                      const at::Tensor& query_student,
                                      const at::Tensor& key_student,
                                      const at::Tensor& query_teacher,
                                      const at::Tensor& key_teacher,
                                      const at::Tensor& lse_student,
                                      const at::Tensor& lse_teacher,
                                      const AttentionOptions& o) {
  static const auto op = typed_operator<AttentionBackwardSignature>("linearard::attention_kl_backward");
  return op.call(grad_kl, query_student, key_student, query_teacher, key_teacher, lse_student, lse_teacher,
                 o.query_padding_mask(), o.key_padding_mask(), o.cu_seqlens(), o.cu_seqlens_key(), o.scale_student(),
                 o.scale_teacher(), o.causal(), to_string(o.divergence()), o.beta(), o.deterministic());
}

RelationOptions relation_options(const char* operator_name,
                                 const OptionalTensor& key_padding_mask,
                                 const OptionalTensor& cu_seqlens,
                                 std::optional<double> scale_student,
                                 std::optional<double> scale_teacher,
                                 bool causal,
                                 std::string_view divergence,
                                 double beta,
                                 std::optional<bool> deterministic) {
  return RelationOptions{}
      .key_padding_mask(key_padding_mask)
      .cu_seqlens(cu_seqlens)
      .scale_student(scale_student)
      .scale_teacher(scale_teacher)
      .causal(causal)
      .divergence(parse_divergence(divergence, operator_name))
      .beta(beta)
      .deterministic(deterministic);
}

AttentionOptions attention_options(const char* operator_name,
                                   const OptionalTensor& query_padding_mask,
                                   const OptionalTensor& key_padding_mask,
                                   const OptionalTensor& cu_seqlens,
                                   const OptionalTensor& cu_seqlens_key,
                                   std::optional<double> scale_student,
                                   std::optional<double> scale_teacher,
                                   bool causal,
                                   std::string_view divergence,
                                   double beta,
                                   std::optional<bool> deterministic) {
  return AttentionOptions{}
      .query_padding_mask(query_padding_mask)
      .key_padding_mask(key_padding_mask)
      .cu_seqlens(cu_seqlens)
      .cu_seqlens_key(cu_seqlens_key)
      .scale_student(scale_student)
      .scale_teacher(scale_teacher)
      .causal(causal)
      .divergence(parse_divergence(divergence, operator_name))
      .beta(beta)
      .deterministic(deterministic);
}

}  // namespace linearard
