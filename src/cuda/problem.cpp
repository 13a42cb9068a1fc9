#include "cuda/problem.h"

#include <cmath>
#include <utility>

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

}  // namespace linearard::cuda
