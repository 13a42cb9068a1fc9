#include "kernel_parameters.h"

#include <cmath>

#include <ATen/ATen.h>

namespace linearard::testing {
namespace {

cuda::Scalar scalar_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return cuda::Scalar::kDouble;
    case at::kHalf:
      return cuda::Scalar::kHalf;
    case at::kBFloat16:
      return cuda::Scalar::kBFloat16;
    default:
      return cuda::Scalar::kFloat;
  }
}

const uint8_t* bytes_of(const at::Tensor& mask) {
  return mask.defined() ? reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()) : nullptr;
}

cuda::BackwardParams gradient_params(const KernelProblem& problem,
                                     const at::Tensor& grad_kl,
                                     const ForwardResult& statistics) {
  cuda::BackwardParams params{};
  params.batch = static_cast<int>(problem.batch());
  params.visibility = problem.memory.visibility;
  params.scale_student = problem.scale_student();
  params.scale_teacher = problem.scale_teacher();
  params.student_multiplier = 1;
  params.teacher_multiplier = 1;
  params.gradient_multiplier = 1;
  params.output_scale = problem.scale_student();
  params.divergence = cuda::Divergence::kForwardKL;
  params.grad_kl = grad_kl.const_data_ptr();
  params.lse_student = statistics.lse_student.const_data_ptr();
  params.lse_teacher = statistics.lse_teacher.const_data_ptr();
  return params;
}

double scale_of(const at::Tensor& x) { return 1 / std::sqrt(static_cast<double>(x.size(3))); }

}  // namespace

cuda::Vectors vectors_of(const at::Tensor& tensor, int64_t heads) {
  constexpr int64_t kChunkBytes = 16;
  const auto whole = [&](int64_t elements) { return elements * tensor.element_size() % kChunkBytes == 0; };
  const bool aligned = whole(tensor.size(3)) && whole(tensor.stride(0)) && whole(tensor.stride(1)) &&
                       whole(tensor.stride(2)) &&
                       reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kChunkBytes == 0;
  return {tensor.const_data_ptr(),
          scalar_of(tensor.scalar_type()),
          static_cast<int>(tensor.size(3)),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          static_cast<int>(heads / tensor.size(1)),
          aligned};
}

EmulatedVisibility visibility_of(int64_t batch,
                                 int64_t rows,
                                 int64_t keys,
                                 bool causal,
                                 const std::optional<at::Tensor>& mask,
                                 const Boundaries& boundaries) {
  EmulatedVisibility memory;
  cuda::Visibility& visibility = memory.visibility;
  visibility.rows = static_cast<int>(rows);
  visibility.keys = static_cast<int>(keys);
  visibility.causal = causal;
  if (!mask && !boundaries.rows.defined()) return memory;
  cuda::RangeParams params{};
  if (mask) {
    memory.row_mask = memory.key_mask = mask->contiguous();
    visibility.row_mask = visibility.key_mask = bytes_of(memory.key_mask);
    memory.prefix = at::constant_pad_nd(at::cumsum(memory.key_mask, 1), {1, 0}).to(at::kInt).contiguous();
    params.key_prefix = memory.prefix.const_data_ptr<int>();
  }
  if (boundaries.rows.defined()) {
    params.row_boundaries = boundaries.rows.const_data_ptr<int64_t>();
    params.key_boundaries = boundaries.keys.const_data_ptr<int64_t>();
    params.sequences = static_cast<int>(boundaries.rows.size(0) - 1);
  }
  memory.ranges = at::empty({batch * (rows + keys), 3}, at::kInt);
  auto* const ranges = reinterpret_cast<cuda::Range*>(memory.ranges.mutable_data_ptr<int>());
  params.batch = static_cast<int>(batch);
  params.rows = visibility.rows;
  params.keys = visibility.keys;
  params.causal = causal;
  params.row_mask = visibility.row_mask;
  params.row_ranges = ranges;
  params.key_ranges = ranges + batch * rows;
  visibility.row_ranges = params.row_ranges;
  visibility.key_ranges = params.key_ranges;
  TORCH_CHECK(cuda::compute_ranges(params, nullptr) == cudaSuccess);
  return memory;
}

at::Tensor clear_marks(int64_t heads, int64_t rows) {
  return at::zeros({1 + heads * ((rows + cuda::kRedoRows - 1) / cuda::kRedoRows)}, at::kInt);
}

double KernelProblem::scale_student() const { return scale_of(student_rows); }
double KernelProblem::scale_teacher() const { return scale_of(teacher_rows); }

KernelProblem relation_problem(const at::Tensor& student,
                               const at::Tensor& teacher,
                               bool causal,
                               const std::optional<at::Tensor>& mask) {
  KernelProblem problem{student, student, teacher, teacher, true, causal, mask};
  problem.memory = visibility_of(problem.batch(), problem.rows(), problem.rows(), causal, mask);
  return problem;
}

KernelProblem attention_problem(const at::Tensor& query_student,
                                const at::Tensor& key_student,
                                const at::Tensor& query_teacher,
                                const at::Tensor& key_teacher,
                                bool causal,
                                const Boundaries& boundaries) {
  KernelProblem problem{query_student, key_student, query_teacher, key_teacher, false, causal, {}};
  problem.memory = visibility_of(problem.batch(), problem.rows(), problem.keys(), causal, {}, boundaries);
  return problem;
}

ForwardResult empty_result(const KernelProblem& problem) {
  const auto rows = [&] { return at::empty({problem.batch(), problem.heads(), problem.rows()}, at::kFloat); };
  return {rows(), rows(), rows(), clear_marks(problem.batch() * problem.heads(), problem.rows())};
}

cuda::ForwardParams forward_params(const KernelProblem& problem, const ForwardResult& to) {
  const int64_t heads = problem.heads();
  cuda::ForwardParams params{};
  params.student_rows = vectors_of(problem.student_rows, heads);
  params.student_keys = vectors_of(problem.student_keys, heads);
  params.teacher_rows = vectors_of(problem.teacher_rows, heads);
  params.teacher_keys = vectors_of(problem.teacher_keys, heads);
  params.batch = static_cast<int>(problem.batch());
  params.heads = static_cast<int>(heads);
  params.visibility = problem.memory.visibility;
  params.scale_student = problem.scale_student();
  params.scale_teacher = problem.scale_teacher();
  params.student_multiplier = 1;
  params.teacher_multiplier = 1;
  params.divergence = cuda::Divergence::kForwardKL;
  params.kl = to.kl.mutable_data_ptr();
  params.lse_student = to.lse_student.mutable_data_ptr();
  params.lse_teacher = to.lse_teacher.mutable_data_ptr();
  params.redo = to.marks.mutable_data_ptr<int>();
  return params;
}

cuda::BackwardParams row_gradient_params(const KernelProblem& problem,
                                         const at::Tensor& grad_kl,
                                         const ForwardResult& statistics) {
  cuda::BackwardParams params = gradient_params(problem, grad_kl, statistics);
  const int64_t heads = problem.heads();
  params.owner_student = vectors_of(problem.student_rows, heads);
  params.owner_teacher = vectors_of(problem.teacher_rows, heads);
  params.other_student = vectors_of(problem.student_keys, heads);
  params.other_teacher = vectors_of(problem.teacher_keys, heads);
  params.heads = static_cast<int>(heads);
  params.other_heads = 1;
  params.row_term = true;
  params.column_term = problem.relation;
  return params;
}

cuda::BackwardParams key_gradient_params(const KernelProblem& problem,
                                         const at::Tensor& grad_kl,
                                         const ForwardResult& statistics) {
  cuda::BackwardParams params = gradient_params(problem, grad_kl, statistics);
  const int64_t heads = problem.heads();
  params.owner_student = vectors_of(problem.student_keys, heads);
  params.owner_teacher = vectors_of(problem.teacher_keys, heads);
  params.other_student = vectors_of(problem.student_rows, heads);
  params.other_teacher = vectors_of(problem.teacher_rows, heads);
  params.heads = static_cast<int>(problem.student_keys.size(1));
  params.other_heads = params.owner_student.group;
  params.column_term = true;
  return params;
}

}  // namespace linearard::testing
