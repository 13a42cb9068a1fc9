#include "cuda/problem.h"

#include <cmath>
#include <utility>

#include <launch.h>

namespace linearard::cuda {

Divergence kernel_divergence(linearard::Divergence divergence) {
  switch (divergence) {
    case linearard::Divergence::kForwardKL:
      return Divergence::kForwardKL;
    case linearard::Divergence::kReverseKL:
      return Divergence::kReverseKL;
    default:
      return Divergence::kJSD;
  }
}

Problem problem_of(const RelationArguments& a, std::optional<VisibilityMemory>* shared) {
  const at::Tensor& x = a.student;
  Problem problem{a.student,
                  a.student,
                  a.teacher,
                  a.teacher,
                  {},
                  true,
                  a.scale_student,
                  a.scale_teacher,
                  a.divergence,
                  a.beta,
                  a.cu_seqlens.has_value(),
                  a.deterministic};
  if (problem.empty()) return problem;
  if (shared != nullptr && shared->has_value()) {
    problem.memory = **shared;
    return problem;
  }
  problem.memory = visibility_of(
      {x.size(0), x.size(2), x.size(2), a.causal, a.key_padding_mask, a.key_padding_mask, a.cu_seqlens, a.cu_seqlens},
      x.device());
  if (shared != nullptr) *shared = problem.memory;
  return problem;
}

Problem problem_of(const AttentionArguments& a) {
  const at::Tensor& x = a.query_student;
  Problem problem{a.query_student,
                  a.key_student,
                  a.query_teacher,
                  a.key_teacher,
                  {},
                  false,
                  a.scale_student,
                  a.scale_teacher,
                  a.divergence,
                  a.beta,
                  a.cu_seqlens.has_value(),
                  a.deterministic};
  if (problem.empty()) return problem;
  problem.memory = visibility_of({x.size(0), x.size(2), a.key_student.size(2), a.causal, a.query_padding_mask,
                                  a.key_padding_mask, a.cu_seqlens, a.cu_seqlens_key},
                                 x.device());
  return problem;
}

void exchange_roles(Problem& problem) {
  std::swap(problem.student_rows, problem.teacher_rows);
  std::swap(problem.student_keys, problem.teacher_keys);
  std::swap(problem.scale_student, problem.scale_teacher);
  problem.divergence = linearard::Divergence::kForwardKL;
}

double difference_ratio(const Problem& problem) {
  if (problem.float64() || problem.student_rows.size(3) != problem.teacher_rows.size(3)) return 0;
  const double ratio = problem.scale_student / problem.scale_teacher;  // NaN or infinite for a zero scale
  return ratio > 1e-6 && ratio < 1e6 ? std::sqrt(ratio) : 0;
}

ForwardParams forward_params(const Problem& problem, const LogitForm* form, const at::Tensor& ratios) {
  ForwardParams params{};
  const int64_t heads = problem.heads();
  params.student_rows = vectors_of(problem.student_rows, heads);
  params.student_keys = vectors_of(problem.student_keys, heads);
  params.teacher_rows = vectors_of(problem.teacher_rows, heads);
  params.teacher_keys = vectors_of(problem.teacher_keys, heads);
  params.batch = narrow(problem.batch());
  params.heads = narrow(heads);
  params.visibility = problem.memory.visibility;
  params.scale_student = form != nullptr ? form->scale_student : problem.scale_student;
  params.scale_teacher = form != nullptr ? form->scale_teacher : problem.scale_teacher;
  params.student_multiplier = form != nullptr ? form->student_multiplier : 1;
  params.teacher_multiplier = form != nullptr ? form->teacher_multiplier : 1;
  params.difference_ratio = difference_ratio(problem);
  params.difference_ratios = ratios.defined() ? ratios.const_data_ptr<double>() : nullptr;
  params.divergence = kernel_divergence(problem.divergence);
  params.beta = problem.beta;
  return params;
}

bool measures_closeness(const Problem& problem) {
  if (difference_ratio(problem) == 0) return false;
  return !uses_tensor_cores(forward_params(problem, nullptr, {})) ||
         problem.student_keys.size(1) != problem.teacher_keys.size(1);
}

at::Tensor measured_ratios(const Problem& problem) {
  if (!measures_closeness(problem)) return {};
  const at::Tensor ratios =
      at::empty({problem.batch() * problem.heads()}, problem.student_rows.options().dtype(at::kDouble));
  const ForwardParams of = forward_params(problem, nullptr, {});
  const ClosenessParams params{
      of.student_rows, of.student_keys, of.teacher_rows,  of.teacher_keys,     of.batch,
      of.heads,        of.visibility,   problem.relation, of.difference_ratio, ratios.mutable_data_ptr<double>()};
  check_launch(measure_closeness(params, current_stream(problem.device())), "closeness of student and teacher",
               problem.device());
  return ratios;
}

}  // namespace linearard::cuda
