#include <torch/library.h>

// Schemas only. docs/operators.md describes every argument; the kernels are registered where they are implemented.

TORCH_LIBRARY(linearard, m) {
  m.def(
      "relation_kl(Tensor student, Tensor teacher, *, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, "
      "Tensor? row_weight=None, float? scale_student=None, float? scale_teacher=None, bool causal=False, "
      "str divergence=\"forward_kl\", float beta=0.5, str reduction=\"mean\", Tensor? num_items=None, "
      "bool? deterministic=None, Tensor? lse_teacher=None) -> Tensor");
  m.def(
      "relation_kl_forward(Tensor student, Tensor teacher, *, Tensor? key_padding_mask=None, "
      "Tensor? cu_seqlens=None, float? scale_student=None, float? scale_teacher=None, bool causal=False, "
      "str divergence=\"forward_kl\", float beta=0.5, bool? deterministic=None, Tensor? lse_teacher=None) "
      "-> (Tensor kl, Tensor lse_student, Tensor lse_teacher)");
  m.def(
      "relation_kl_backward(Tensor grad_kl, Tensor student, Tensor teacher, Tensor lse_student, Tensor lse_teacher, "
      "*, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, float? scale_student=None, "
      "float? scale_teacher=None, bool causal=False, str divergence=\"forward_kl\", float beta=0.5, "
      "bool? deterministic=None) -> Tensor");
  m.def(
      "relation_lse(Tensor x, *, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, float? scale=None, "
      "bool causal=False, bool? deterministic=None) -> Tensor");
  // Several relations in one call: lists of one tensor for each relation, in the same order.
  m.def(
      "layer_relation_kl(Tensor[] students, Tensor[] teachers, *, Tensor? key_padding_mask=None, "
      "Tensor? cu_seqlens=None, Tensor? row_weight=None, float? scale_student=None, float? scale_teacher=None, "
      "bool causal=False, str divergence=\"forward_kl\", float beta=0.5, str reduction=\"mean\", "
      "Tensor? num_items=None, bool? deterministic=None) -> Tensor");
  m.def(
      "layer_relation_kl_forward(Tensor[] students, Tensor[] teachers, *, Tensor? key_padding_mask=None, "
      "Tensor? cu_seqlens=None, float? scale_student=None, float? scale_teacher=None, bool causal=False, "
      "str divergence=\"forward_kl\", float beta=0.5, bool? deterministic=None) "
      "-> (Tensor[] kl, Tensor[] lse_student, Tensor[] lse_teacher)");
  m.def(
      "layer_relation_kl_backward(Tensor[] grad_kl, Tensor[] students, Tensor[] teachers, Tensor[] lse_student, "
      "Tensor[] lse_teacher, *, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, float? scale_student=None, "
      "float? scale_teacher=None, bool causal=False, str divergence=\"forward_kl\", float beta=0.5, "
      "bool? deterministic=None) -> Tensor[]");
  // The mean over all rows of kl, summed in float64: the reduction of the operators that return a loss.
  m.def("mean_of_rows(Tensor kl) -> Tensor");
  // Its backward: the gradient of each of `count` rows, one number for all.
  m.def("mean_of_rows_backward(Tensor grad, SymInt count) -> Tensor");
  // The same of each tensor of a list, [R], and the inverse of how many rows each has, [R]: the gradient of each row.
  m.def("means_of_rows(Tensor[] kl) -> (Tensor mean, Tensor inverse_count)");
  m.def(
      "attention_kl(Tensor query_student, Tensor key_student, Tensor query_teacher, Tensor key_teacher, *, "
      "Tensor? query_padding_mask=None, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_key=None, Tensor? row_weight=None, float? scale_student=None, float? scale_teacher=None, "
      "bool causal=True, str divergence=\"forward_kl\", float beta=0.5, str reduction=\"mean\", "
      "Tensor? num_items=None, bool? deterministic=None) -> Tensor");
  m.def(
      "attention_kl_forward(Tensor query_student, Tensor key_student, Tensor query_teacher, Tensor key_teacher, *, "
      "Tensor? query_padding_mask=None, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_key=None, float? scale_student=None, float? scale_teacher=None, bool causal=True, "
      "str divergence=\"forward_kl\", float beta=0.5, bool? deterministic=None) "
      "-> (Tensor kl, Tensor lse_student, Tensor lse_teacher)");
  m.def(
      "attention_kl_backward(Tensor grad_kl, Tensor query_student, Tensor key_student, Tensor query_teacher, "
      "Tensor key_teacher, Tensor lse_student, Tensor lse_teacher, *, Tensor? query_padding_mask=None, "
      "Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, Tensor? cu_seqlens_key=None, "
      "float? scale_student=None, float? scale_teacher=None, bool causal=True, str divergence=\"forward_kl\", "
      "float beta=0.5, bool? deterministic=None) -> (Tensor grad_query_student, Tensor grad_key_student)");
}
