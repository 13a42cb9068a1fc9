#include "triangular_steps.h"

#include <climits>
#include <cmath>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <instantiations/declarations.h>
#include <sm90/instantiations.h>
#include <triangular/instantiations.h>
#include <triangular/launch.h>

namespace linearard::testing {
namespace {

using cuda::Traversal;

/// As many as there are walks of a few heads: some are cut into parts.
constexpr int kMultiprocessors = 8;

template <typename T>
cudaError_t launch_hopper(const cuda::TriangularForwardParams& p) {
  if (p.traversal == Traversal::kRows) {
    if (p.student.dim <= 64) return cuda::sm90::launch_rows_forward<T, 64>(p, kMultiprocessors, nullptr);
    return cuda::sm90::launch_rows_forward<T, 128>(p, kMultiprocessors, nullptr);
  }
  if (p.student.dim <= 64) return cuda::sm90::launch_forward<T, 64>(p, kMultiprocessors, nullptr);
  return cuda::sm90::launch_forward<T, 128>(p, kMultiprocessors, nullptr);
}

template <typename T>
cudaError_t launch_hopper(const cuda::TriangularBackwardParams& p) {
  if (p.student.dim <= 64) return cuda::sm90::launch_backward<T, 64>(p, kMultiprocessors, nullptr);
  return cuda::sm90::launch_backward<T, 128>(p, kMultiprocessors, nullptr);
}

cudaError_t launch_portable(const cuda::TriangularForwardParams& p) {
  namespace kernels = cuda::triangular;
  if (p.student.type == cuda::Scalar::kHalf) return kernels::launch_forward<__half, 128>(p, nullptr);
  if (p.student.dim <= 64) return kernels::launch_forward<__nv_bfloat16, 64>(p, nullptr);
  if (p.student.dim <= 80) return kernels::launch_forward<__nv_bfloat16, 80>(p, nullptr);
  return kernels::launch_forward<__nv_bfloat16, 256>(p, nullptr);
}

cudaError_t launch_portable(const cuda::TriangularBackwardParams& p) {
  namespace kernels = cuda::triangular;
  if (p.student.type == cuda::Scalar::kHalf) return kernels::launch_backward<__half, 128>(p, nullptr);
  if (p.student.dim <= 64) return kernels::launch_backward<__nv_bfloat16, 64>(p, nullptr);
  return kernels::launch_backward<__nv_bfloat16, 80>(p, nullptr);
}

template <typename Params>
cudaError_t launch(const Params& p, Kernels kernels) {
  if (kernels == Kernels::kPortable) return launch_portable(p);
  return p.student.type == cuda::Scalar::kHalf ? launch_hopper<__half>(p) : launch_hopper<__nv_bfloat16>(p);
}

}  // namespace

std::vector<Rows> run_forward(const std::vector<KernelProblem>& relations, Traversal traversal, Kernels kernels) {
  const KernelProblem& first = relations[0];
  auto params = triangular_params<cuda::TriangularForwardParams>(relations, traversal);
  const int64_t problems = params.group.problems;
  const int64_t tokens = params.tokens;
  const auto memory = [&](int64_t floats) { return at::full({problems, floats}, NAN, at::kFloat); };
  const auto ints = [](at::IntArrayRef shape) { return at::full(shape, -1, at::kInt); };
  // What has to be zero is zeroed by the first step.
  const at::Tensor sums = memory(cuda::kSums * tokens);
  const at::Tensor token_values = memory(2 * tokens);
  const at::Tensor own = memory(2 * tokens);
  const at::Tensor centers = memory(1);
  const at::Tensor wide_heads = ints({problems});
  const at::Tensor counts = ints({problems});
  const at::Tensor largest = at::full({problems, (tokens + 63) / 64}, INT_MAX, at::kInt);
  const at::Tensor lists = ints({problems, tokens});

  cuda::PrepareForwardParams prepare{};
  cuda::FinishForwardParams finish{};
  prepare.group = finish.group = params.group;
  prepare.vectors = params.vectors;
  prepare.tokens = params.tokens;
  prepare.mask = params.mask;
  prepare.scale_student = first.scale_student();
  prepare.scale_teacher = first.scale_teacher();
  prepare.largest = largest.mutable_data_ptr<int>();
  const at::Tensor plain_heads = ints({problems});
  params.largest = prepare.largest;
  if (kernels == Kernels::kHopper && traversal == Traversal::kTriangular) {
    params.references = finish.references = prepare.references = token_values.mutable_data_ptr<float>();
    finish.plain_heads = params.plain_heads = plain_heads.mutable_data_ptr<int>();
  } else {
    prepare.token_values = reinterpret_cast<cuda::ForwardToken*>(token_values.mutable_data_ptr<float>());
    params.token_values = finish.token_values = prepare.token_values;
  }
  params.own = prepare.own = reinterpret_cast<cuda::OwnLogit*>(own.mutable_data_ptr<float>());
  finish.own = params.own;
  prepare.centers = centers.mutable_data_ptr<float>();
  finish.centers = params.centers = prepare.centers;
  prepare.wide_heads = wide_heads.mutable_data_ptr<int>();
  finish.wide_heads = params.wide_heads = prepare.wide_heads;
  params.sums = prepare.sums = sums.mutable_data_ptr<float>();
  finish.sums = params.sums;
  finish.row_counts = prepare.row_counts = counts.mutable_data_ptr<int>();
  finish.row_lists = lists.mutable_data_ptr<int>();
  finish.visibility = first.memory.visibility;
  finish.factors = params.factors;
  finish.ordered = traversal == Traversal::kRows;
  std::vector<Rows> rows;
  for (size_t r = 0; r < relations.size(); ++r) {
    rows.push_back({empty_result(relations[r]), 0});
    const ForwardResult& to = rows[r].result;
    to.marks.fill_(-1);
    prepare.redo[r] = to.marks.mutable_data_ptr<int>();
    finish.rows[r] = {to.kl.mutable_data_ptr<float>(), to.lse_student.mutable_data_ptr<float>(),
                      to.lse_teacher.mutable_data_ptr<float>()};
  }

  EXPECT_EQ(cuda::triangular::prepare_forward(prepare, nullptr), cudaSuccess);
  EXPECT_EQ(sums.abs().sum().item<double>(), 0);
  EXPECT_EQ(counts.abs().sum().item<int64_t>(), 0);
  for (const Rows& of : rows)
    EXPECT_EQ(of.result.marks.abs().sum().item<int64_t>(), 0);
  EXPECT_EQ(launch(params, kernels), cudaSuccess);
  EXPECT_EQ(cuda::triangular::finish_forward(finish, nullptr), cudaSuccess);
  for (int64_t problem = 0; finish.ordered && problem < problems; ++problem) {
    const at::Tensor list = lists[problem].narrow(0, 0, counts[problem].item<int64_t>());
    EXPECT_TRUE(list.numel() < 2 || (list.diff() > 0).all().item<bool>());
  }
  for (size_t r = 0; r < relations.size(); ++r) {
    const int64_t before = params.group.first[r];
    rows[r].listed = counts.narrow(0, before, relations[r].batch() * relations[r].heads()).sum().item<int64_t>();
    if (rows[r].listed == 0) continue;
    cuda::ForwardParams dense = forward_params(relations[r], rows[r].result);
    dense.row_counts = finish.row_counts + before;
    dense.row_lists = finish.row_lists + before * tokens;
    const cudaError_t error = params.student.type == cuda::Scalar::kHalf
                                  ? cuda::mma::launch_forward<__half, 128>(dense, nullptr)
                                  : cuda::mma::launch_forward<__nv_bfloat16, 64>(dense, nullptr);
    EXPECT_EQ(error, cudaSuccess);
  }
  return rows;
}

std::vector<Gradient> run_backward(const std::vector<KernelProblem>& relations,
                                   Traversal traversal,
                                   const std::vector<at::Tensor>& grad_kl,
                                   const std::vector<ForwardResult>& rows,
                                   Kernels kernels) {
  auto params = triangular_params<cuda::TriangularBackwardParams>(relations, traversal);
  const int64_t problems = params.group.problems;
  const int64_t tokens = params.tokens;
  const at::Tensor token_values = at::full({problems, 4 * tokens}, NAN, at::kFloat);
  const at::Tensor wide_heads = at::full({problems}, -1, at::kInt);
  const at::Tensor sums = at::full({problems, tokens, params.student.dim}, NAN, at::kFloat);
  cuda::PrepareBackwardParams prepare{};
  cuda::FinishBackwardParams finish{};
  prepare.group = finish.group = params.group;
  prepare.visibility = relations[0].memory.visibility;
  prepare.token_values = reinterpret_cast<cuda::BackwardToken*>(token_values.mutable_data_ptr<float>());
  params.token_values = prepare.token_values;
  prepare.wide_heads = wide_heads.mutable_data_ptr<int>();
  finish.wide_heads = params.wide_heads = prepare.wide_heads;
  const at::Tensor plain_heads = at::full({problems}, -1, at::kInt);
  if (kernels == Kernels::kHopper && traversal == Traversal::kTriangular) {
    params.plain_heads = prepare.plain_heads = plain_heads.mutable_data_ptr<int>();
  }
  params.gradient = prepare.gradient = sums.mutable_data_ptr<float>();
  prepare.gradient_floats = sums.numel();
  finish.sums = params.gradient;
  finish.type = params.student.type;
  finish.tokens = params.tokens;
  finish.dim = params.student.dim;
  finish.output_scale = relations[0].scale_student();
  std::vector<Gradient> gradients;
  std::vector<at::Tensor> marks, row_grads, largest;
  for (size_t r = 0; r < relations.size(); ++r) {
    const int64_t own = relations[r].batch() * relations[r].heads();
    const bool one_grad = grad_kl[r].stride(-1) == 0;
    gradients.push_back({at::full_like(relations[r].student_rows, NAN).contiguous(), {}});
    marks.push_back(clear_marks(own, tokens).fill_(-1));
    row_grads.push_back(at::full({own, tokens}, NAN, at::kFloat));
    largest.push_back(-grad_kl[r].abs().max());  // any sign will do
    const float* const largest_grad =
        params.student.type == cuda::Scalar::kHalf ? largest[r].const_data_ptr<float>() : nullptr;
    prepare.rows[r] = {grad_kl[r].const_data_ptr<float>(),
                       one_grad,
                       rows[r].lse_student.const_data_ptr<float>(),
                       rows[r].lse_teacher.const_data_ptr<float>(),
                       largest_grad,
                       one_grad ? row_grads[r].mutable_data_ptr<float>() : nullptr,
                       marks[r].mutable_data_ptr<int>()};
    finish.relations[r] = {gradients[r].gradient.mutable_data_ptr(), largest_grad, marks[r].mutable_data_ptr<int>()};
  }

  EXPECT_EQ(cuda::triangular::prepare_backward(prepare, nullptr), cudaSuccess);
  EXPECT_EQ(sums.abs().sum().item<double>(), 0);
  for (size_t r = 0; r < relations.size(); ++r) {
    EXPECT_EQ(marks[r].abs().sum().item<int64_t>(), 0);
    if (prepare.rows[r].one_grad) {
      EXPECT_TRUE(at::equal(row_grads[r], grad_kl[r].reshape_as(row_grads[r])));
    }
  }
  EXPECT_EQ(launch(params, kernels), cudaSuccess);
  EXPECT_EQ(cuda::triangular::finish_backward(finish, nullptr), cudaSuccess);
  for (size_t r = 0; r < relations.size(); ++r) {
    EXPECT_EQ(marks[r].sum().item<int64_t>(), 0);
    gradients[r].wide_heads = wide_heads.narrow(0, params.group.first[r], relations[r].batch() * relations[r].heads());
  }
  return gradients;
}

}  // namespace linearard::testing
