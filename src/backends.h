#pragma once

#include <utility>
#include <vector>

#include "checks.h"
#include "operators.h"

// The kernels' entries for the dispatcher: checks, then the backend. A backend is a struct of static functions that
// take checked arguments; one without functions for several relations computes them one by one.

namespace linearard {

template <typename Backend>
struct Kernels {
  static ThreeTensors relation_kl_forward(const at::Tensor& student,
                                          const at::Tensor& teacher,
                                          const OptionalTensor& key_padding_mask,
                                          const OptionalTensor& cu_seqlens,
                                          std::optional<double> scale_student,
                                          std::optional<double> scale_teacher,
                                          bool causal,
                                          std::string_view divergence,
                                          double beta,
                                          std::optional<bool> deterministic,
                                          const OptionalTensor& lse_teacher) {
    constexpr const char* kName = "relation_kl_forward";
    RelationOptions options = relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher,
                                               causal, divergence, beta, deterministic);
    const RelationArguments arguments = check_relation(kName, student, teacher, options.lse_teacher(lse_teacher));
    check_values("relation_kl", "cu_seqlens", cu_seqlens, student);
    ThreeTensors results = Backend::relation_forward(arguments);
    if (lse_teacher) std::get<2>(results) = lse_teacher->to(statistics_dtype(arguments)).clone();
    return results;
  }

  static at::Tensor relation_kl_backward(const at::Tensor& grad_kl,
                                         const at::Tensor& student,
                                         const at::Tensor& teacher,
                                         const at::Tensor& lse_student,
                                         const at::Tensor& lse_teacher,
                                         const OptionalTensor& key_padding_mask,
                                         const OptionalTensor& cu_seqlens,
                                         std::optional<double> scale_student,
                                         std::optional<double> scale_teacher,
                                         bool causal,
                                         std::string_view divergence,
                                         double beta,
                                         std::optional<bool> deterministic) {
    constexpr const char* kName = "relation_kl_backward";
    const RelationArguments arguments =
        check_relation(kName, student, teacher,
                       relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                        divergence, beta, deterministic));
    check_row_tensor(kName, "grad_kl", grad_kl, student);
    check_row_tensor(kName, "lse_student", lse_student, student);
    check_row_tensor(kName, "lse_teacher", lse_teacher, student);
    check_values(kName, "cu_seqlens", cu_seqlens, student);
    return Backend::relation_backward(grad_kl, lse_student, lse_teacher, arguments);
  }

  static ThreeTensorVectors layer_relation_kl_forward(at::TensorList students,
                                                      at::TensorList teachers,
                                                      const OptionalTensor& key_padding_mask,
                                                      const OptionalTensor& cu_seqlens,
                                                      std::optional<double> scale_student,
                                                      std::optional<double> scale_teacher,
                                                      bool causal,
                                                      std::string_view divergence,
                                                      double beta,
                                                      std::optional<bool> deterministic) {
    constexpr const char* kName = "layer_relation_kl_forward";
    const std::vector<RelationArguments> relations =
        check_relations(kName, students, teachers,
                        relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                         divergence, beta, deterministic));
    check_values("layer_relation_kl", "cu_seqlens", cu_seqlens, students[0]);
    if constexpr (requires { Backend::layer_forward(relations); }) {
      return Backend::layer_forward(relations);
    } else {
      ThreeTensorVectors results;
      for (const RelationArguments& arguments : relations) {
        auto [kl, lse_student, lse_teacher] = Backend::relation_forward(arguments);
        std::get<0>(results).push_back(std::move(kl));
        std::get<1>(results).push_back(std::move(lse_student));
        std::get<2>(results).push_back(std::move(lse_teacher));
      }
      return results;
    }
  }

  static TensorVector layer_relation_kl_backward(at::TensorList grad_kl,
                                                 at::TensorList students,
                                                 at::TensorList teachers,
                                                 at::TensorList lse_student,
                                                 at::TensorList lse_teacher,
                                                 const OptionalTensor& key_padding_mask,
                                                 const OptionalTensor& cu_seqlens,
                                                 std::optional<double> scale_student,
                                                 std::optional<double> scale_teacher,
                                                 bool causal,
                                                 std::string_view divergence,
                                                 double beta,
                                                 std::optional<bool> deterministic) {
    constexpr const char* kName = "layer_relation_kl_backward";
    const std::vector<RelationArguments> relations =
        check_relations(kName, students, teachers,
                        relation_options(kName, key_padding_mask, cu_seqlens, scale_student, scale_teacher, causal,
                                         divergence, beta, deterministic));
    check_row_tensors(kName, "grad_kl", grad_kl, students);
    check_row_tensors(kName, "lse_student", lse_student, students);
    check_row_tensors(kName, "lse_teacher", lse_teacher, students);
    check_values(kName, "cu_seqlens", cu_seqlens, students[0]);
    if constexpr (requires { Backend::layer_backward(grad_kl, lse_student, lse_teacher, relations); }) {
      return Backend::layer_backward(grad_kl, lse_student, lse_teacher, relations);
    } else {
      TensorVector gradients;
      for (size_t i = 0; i < relations.size(); ++i)
        gradients.push_back(Backend::relation_backward(grad_kl[i], lse_student[i], lse_teacher[i], relations[i]));
      return gradients;
    }
  }

  static at::Tensor relation_lse(const at::Tensor& x,
                                 const OptionalTensor& key_padding_mask,
                                 const OptionalTensor& cu_seqlens,
                                 std::optional<double> scale,
                                 bool causal,
                                 std::optional<bool> deterministic) {
    constexpr const char* kName = "relation_lse";
    const RelationArguments arguments =
        check_lse(kName, x,
                  relation_options(kName, key_padding_mask, cu_seqlens, scale, scale, causal,
                                   to_string(Divergence::kForwardKL), 0.5, deterministic));
    check_values(kName, "cu_seqlens", cu_seqlens, x);
    return Backend::relation_lse(arguments);
  }

  static ThreeTensors attention_kl_forward(const at::Tensor& query_student,
                                           const at::Tensor& key_student,
                                           const at::Tensor& query_teacher,
                                           const at::Tensor& key_teacher,
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
    constexpr const char* kName = "attention_kl_forward";
    const AttentionArguments arguments =
        check_attention(kName, query_student, key_student, query_teacher, key_teacher,
                        attention_options(kName, query_padding_mask, key_padding_mask, cu_seqlens, cu_seqlens_key,
                                          scale_student, scale_teacher, causal, divergence, beta, deterministic));
    check_values("attention_kl", "cu_seqlens", cu_seqlens, query_student);
    check_values("attention_kl", "cu_seqlens_key", cu_seqlens_key, key_student);
    return Backend::attention_forward(arguments);
  }

  static TwoTensors attention_kl_backward(const at::Tensor& grad_kl,
                                          const at::Tensor& query_student,
                                          const at::Tensor& key_student,
                                          const at::Tensor& query_teacher,
                                          const at::Tensor& key_teacher,
                                          const at::Tensor& lse_student,
                                          const at::Tensor& lse_teacher,
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
    constexpr const char* kName = "attention_kl_backward";
    const AttentionArguments arguments =
        check_attention(kName, query_student, key_student, query_teacher, key_teacher,
                        attention_options(kName, query_padding_mask, key_padding_mask, cu_seqlens, cu_seqlens_key,
                                          scale_student, scale_teacher, causal, divergence, beta, deterministic));
    check_row_tensor(kName, "grad_kl", grad_kl, query_student);
    check_row_tensor(kName, "lse_student", lse_student, query_student);
    check_row_tensor(kName, "lse_teacher", lse_teacher, query_student);
    check_values(kName, "cu_seqlens", cu_seqlens, query_student);
    check_values(kName, "cu_seqlens_key", cu_seqlens_key, key_student);
    return Backend::attention_backward(grad_kl, lse_student, lse_teacher, arguments);
  }

  template <typename Library>
  static void register_in(Library& library) {
    library.impl("relation_kl_forward", &Kernels::relation_kl_forward);
    library.impl("relation_kl_backward", &Kernels::relation_kl_backward);
    library.impl("layer_relation_kl_forward", &Kernels::layer_relation_kl_forward);
    library.impl("layer_relation_kl_backward", &Kernels::layer_relation_kl_backward);
    library.impl("relation_lse", &Kernels::relation_lse);
    library.impl("attention_kl_forward", &Kernels::attention_kl_forward);
    library.impl("attention_kl_backward", &Kernels::attention_kl_backward);
  }

 private:
  static void check_values(const char* name,
                           const char* argument,
                           const OptionalTensor& cu_seqlens,
                           const at::Tensor& x) {
    if constexpr (Backend::kHasValues) {
      if (cu_seqlens) check_sequence_boundaries(name, argument, *cu_seqlens, x.size(2));
    }
  }
};

}  // namespace linearard
