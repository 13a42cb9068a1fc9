#include <algorithm>
#include <climits>
#include <cmath>
#include <string>
#include <tuple>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <emulation/block.h>
#include <instantiations/declarations.h>
#include <triangular/instantiations.h>
#include <triangular/launch.h>

#include "kernel_parameters.h"
#include "reference.h"

// The triangular kernels with the steps before and after them, run on the CPU by tests/emulation, against float64.

namespace linearard {
namespace {

using cuda::Traversal;
using testing::KernelProblem;

template <typename Params>
Params params_of(const KernelProblem& problem, Traversal traversal) {
  constexpr double kUnit = 1.4426950408889634;
  Params params{};
  params.student = testing::vectors_of(problem.student_rows, problem.heads());
  params.teacher = testing::vectors_of(problem.teacher_rows, problem.heads());
  params.batch = static_cast<int>(problem.batch());
  params.heads = static_cast<int>(problem.heads());
  params.tokens = static_cast<int>(problem.rows());
  params.causal = problem.causal;
  params.traversal = traversal;
  params.mask = problem.memory.visibility.row_mask;
  params.factors = {static_cast<float>(problem.scale_teacher() * kUnit),
                    static_cast<float>(problem.scale_student() * kUnit),
                    static_cast<float>(1 - problem.scale_teacher() / problem.scale_student())};
  return params;
}

cudaError_t launch(const cuda::TriangularForwardParams& p) {
  namespace kernels = cuda::triangular;
  if (p.student.type == cuda::Scalar::kHalf) return kernels::launch_forward<__half, 128>(p, nullptr);
  if (p.student.dim <= 64) return kernels::launch_forward<__nv_bfloat16, 64>(p, nullptr);
  if (p.student.dim <= 80) return kernels::launch_forward<__nv_bfloat16, 80>(p, nullptr);
  return kernels::launch_forward<__nv_bfloat16, 256>(p, nullptr);
}

cudaError_t launch(const cuda::TriangularBackwardParams& p) {
  namespace kernels = cuda::triangular;
  if (p.student.type == cuda::Scalar::kHalf) return kernels::launch_backward<__half, 128>(p, nullptr);
  if (p.student.dim <= 64) return kernels::launch_backward<__nv_bfloat16, 64>(p, nullptr);
  return kernels::launch_backward<__nv_bfloat16, 80>(p, nullptr);
}

/// The rows of a forward, and how many of them were left to the dense kernels.
struct Rows {
  testing::ForwardResult result;
  int64_t listed;
};

/// All three steps; the listed rows are computed by the dense kernels where they exist for the type and dimension.
Rows run_forward(const KernelProblem& problem, Traversal traversal) {
  auto params = params_of<cuda::TriangularForwardParams>(problem, traversal);
  const int64_t problems = problem.batch() * problem.heads();
  const int64_t tokens = problem.rows();
  const auto memory = [&](int64_t floats) { return at::full({problems, floats}, NAN, at::kFloat); };
  // What has to be zero is zeroed by the first step.
  const at::Tensor sums = memory(cuda::kSums * tokens);
  const at::Tensor token_values = memory(2 * tokens);
  const at::Tensor own = memory(2 * tokens);
  const at::Tensor centers = memory(1);
  const at::Tensor wide_heads = at::full({problems}, -1, at::kInt);
  const at::Tensor counts = at::full({problems}, -1, at::kInt);
  const at::Tensor largest = at::full({problems, (tokens + 63) / 64}, INT_MAX, at::kInt);
  const at::Tensor lists = at::full({problems, tokens}, -1, at::kInt);
  auto* const values = reinterpret_cast<cuda::ForwardToken*>(token_values.mutable_data_ptr<float>());
  auto* const own_logits = reinterpret_cast<cuda::OwnLogit*>(own.mutable_data_ptr<float>());
  const testing::ForwardResult result = testing::empty_result(problem);
  result.marks.fill_(-1);

  EXPECT_EQ(cuda::triangular::prepare_forward(
                {params.student, params.teacher, params.batch, params.heads, params.tokens, params.mask,
                 problem.scale_student(), problem.scale_teacher(), largest.mutable_data_ptr<int>(), values, own_logits,
                 centers.mutable_data_ptr<float>(), wide_heads.mutable_data_ptr<int>(), sums.mutable_data_ptr<float>(),
                 counts.mutable_data_ptr<int>(), result.marks.mutable_data_ptr<int>()},
                nullptr),
            cudaSuccess);
  EXPECT_EQ(sums.abs().sum().item<double>(), 0);
  EXPECT_EQ(counts.abs().sum().item<int64_t>(), 0);
  EXPECT_EQ(result.marks.abs().sum().item<int64_t>(), 0);
  params.token_values = values;
  params.wide_heads = wide_heads.const_data_ptr<int>();
  params.sums = sums.mutable_data_ptr<float>();
  params.own = own_logits;
  const bool ordered = traversal == Traversal::kRows;
  EXPECT_EQ(launch(params), cudaSuccess);
  EXPECT_EQ(cuda::triangular::finish_forward(
                {params.batch, params.heads, problem.memory.visibility, params.factors, values, own_logits,
                 centers.const_data_ptr<float>(), params.wide_heads, params.sums, result.kl.mutable_data_ptr<float>(),
                 result.lse_student.mutable_data_ptr<float>(), result.lse_teacher.mutable_data_ptr<float>(),
                 counts.mutable_data_ptr<int>(), lists.mutable_data_ptr<int>(), ordered},
                nullptr),
            cudaSuccess);
  const auto listed = counts.sum().item<int64_t>();
  for (int64_t problem_index = 0; ordered && problem_index < problems; ++problem_index) {
    const at::Tensor list = lists[problem_index].narrow(0, 0, counts[problem_index].item<int64_t>());
    EXPECT_TRUE(list.numel() < 2 || (list.diff() > 0).all().item<bool>());
  }
  if (listed > 0) {
    cuda::ForwardParams dense = testing::forward_params(problem, result);
    dense.row_counts = counts.const_data_ptr<int>();
    dense.row_lists = lists.const_data_ptr<int>();
    const cudaError_t error = params.student.type == cuda::Scalar::kHalf
                                  ? cuda::mma::launch_forward<__half, 128>(dense, nullptr)
                                  : cuda::mma::launch_forward<__nv_bfloat16, 64>(dense, nullptr);
    EXPECT_EQ(error, cudaSuccess);
  }
  return {result, listed};
}

struct Gradient {
  at::Tensor gradient;
  at::Tensor wide_heads;
};

Gradient run_backward(const KernelProblem& problem,
                      Traversal traversal,
                      const at::Tensor& grad_kl,
                      const testing::ForwardResult& rows) {
  auto params = params_of<cuda::TriangularBackwardParams>(problem, traversal);
  const int64_t problems = problem.batch() * problem.heads();
  const int64_t tokens = problem.rows();
  const at::Tensor token_values = at::full({problems, 4 * tokens}, NAN, at::kFloat);
  const at::Tensor wide_heads = at::full({problems}, -1, at::kInt);
  const at::Tensor sums = at::full({problems, tokens, params.student.dim}, NAN, at::kFloat);
  const at::Tensor gradient = at::full_like(problem.student_rows, NAN).contiguous();
  const at::Tensor marks = testing::clear_marks(problems, tokens).fill_(-1);
  const at::Tensor row_grads = at::full({problems, tokens}, NAN, at::kFloat);
  const bool one_grad = grad_kl.stride(-1) == 0;
  const at::Tensor largest = -grad_kl.abs().max();  // any sign will do
  auto* const values = reinterpret_cast<cuda::BackwardToken*>(token_values.mutable_data_ptr<float>());
  const float* const largest_grad =
      params.student.type == cuda::Scalar::kHalf ? largest.const_data_ptr<float>() : nullptr;

  EXPECT_EQ(cuda::triangular::prepare_backward(
                {params.batch, params.heads, problem.memory.visibility, grad_kl.const_data_ptr<float>(), one_grad,
                 rows.lse_student.const_data_ptr<float>(), rows.lse_teacher.const_data_ptr<float>(), largest_grad,
                 values, wide_heads.mutable_data_ptr<int>(), one_grad ? row_grads.mutable_data_ptr<float>() : nullptr,
                 sums.mutable_data_ptr<float>(), sums.numel(), marks.mutable_data_ptr<int>()},
                nullptr),
            cudaSuccess);
  EXPECT_EQ(sums.abs().sum().item<double>(), 0);
  EXPECT_EQ(marks.abs().sum().item<int64_t>(), 0);
  if (one_grad) {
    EXPECT_TRUE(at::equal(row_grads, grad_kl.reshape({problems, tokens})));
  }
  params.token_values = values;
  params.wide_heads = wide_heads.const_data_ptr<int>();
  params.gradient = sums.mutable_data_ptr<float>();
  EXPECT_EQ(launch(params), cudaSuccess);
  EXPECT_EQ(
      cuda::triangular::finish_backward({params.student.type, params.batch, params.heads, params.tokens,
                                         params.student.dim, problem.scale_student(), largest_grad, params.wide_heads,
                                         params.gradient, gradient.mutable_data_ptr(), marks.mutable_data_ptr<int>()},
                                        nullptr),
      cudaSuccess);
  EXPECT_EQ(marks.sum().item<int64_t>(), 0);
  return {gradient, wide_heads};
}

struct Case {
  at::ScalarType type;
  int64_t tokens;
  int64_t dim;
  bool causal;
  bool mask;
  Traversal traversal;
};

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  return std::string(at::toString(c.type)) + std::to_string(c.dim) + (c.causal ? "Causal" : "Dense") +
         (c.mask ? "Masked" : "") + (c.traversal == Traversal::kRows ? "Rows" : "Triangular");
}

class EmulatedTriangular : public ::testing::TestWithParam<Case> {};

TEST_P(EmulatedTriangular, AgreesWithFloat64) {
  const Case& c = GetParam();
  const int64_t batch = c.mask ? 2 : 1;
  const auto [student, teacher] = testing::student_and_teacher(batch, 2, c.tokens, c.dim, c.type);
  auto options = RelationOptions{}.causal(c.causal);
  std::optional<at::Tensor> mask;
  if (c.mask) {
    mask = (at::arange(c.tokens).unsqueeze(0) < at::tensor({c.tokens, c.tokens - 50}).unsqueeze(1)) &
           (at::arange(c.tokens) != 40);
    options.key_padding_mask(*mask);
    student.masked_fill_(mask->logical_not().unsqueeze(1).unsqueeze(-1), NAN);  // padding may hold anything
  }
  const KernelProblem problem = testing::relation_problem(student, teacher, c.causal, mask);
  const auto [rows, listed] = run_forward(problem, c.traversal);
  EXPECT_LT(listed, rows.kl.numel() / 20);
  const at::Tensor exact_student =
      (c.mask ? at::nan_to_num(student) : student).to(at::kDouble).contiguous().requires_grad_();
  const auto exact = testing::reference_relation(exact_student, teacher, options);
  EXPECT_LE(testing::row_excess(rows.kl, std::get<0>(exact)), 0.0);
  EXPECT_LE(testing::row_excess(rows.lse_student, std::get<1>(exact)), 0.0);
  EXPECT_LE(testing::row_excess(rows.lse_teacher, std::get<2>(exact)), 0.0);
  if (c.dim > 128) return;  // there is no triangular backward

  const at::Tensor weights = at::linspace(-0.5, 1.0, rows.kl.numel(), at::kFloat).view_as(rows.kl);
  const auto [gradient, wide_heads] = run_backward(problem, c.traversal, weights, rows);
  EXPECT_EQ(wide_heads.sum().item<int64_t>(), 0);
  (std::get<0>(exact) * weights).sum().backward();
  EXPECT_LE(testing::relative_error(gradient, exact_student.grad()), testing::gradient_promise(c.type));
}

INSTANTIATE_TEST_SUITE_P(,
                         EmulatedTriangular,
                         ::testing::Values(Case{at::kBFloat16, 300, 64, false, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 256, 64, true, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 200, 64, false, true, Traversal::kTriangular},
                                           Case{at::kBFloat16, 200, 64, true, true, Traversal::kRows},
                                           Case{at::kBFloat16, 270, 64, false, false, Traversal::kRows},
                                           Case{at::kBFloat16, 150, 56, false, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 150, 80, false, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 150, 72, true, false, Traversal::kRows},
                                           Case{at::kHalf, 270, 128, false, false, Traversal::kTriangular},
                                           Case{at::kHalf, 150, 104, true, false, Traversal::kTriangular},
                                           Case{at::kBFloat16, 130, 256, false, false, Traversal::kTriangular}),
                         name_of);

/// Rows whose sums have lost digits: every logit moves in the same direction, far more than the rows diverge.
TEST(EmulatedTriangularRows, RowsThatLostDigitsAreComputedAgain) {
  const at::Tensor teacher = (testing::gaussian(1, 1, 200, 64, 5) * 0.5 + 1.5).to(at::kBFloat16);
  const at::Tensor student = (teacher.to(at::kDouble) * 1.02).to(at::kBFloat16);
  const auto [rows, listed] = run_forward(testing::relation_problem(student, teacher), Traversal::kTriangular);
  EXPECT_GT(listed, 0);
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  const at::Tensor& kl = std::get<0>(exact);
  const at::Tensor allowed = at::where(kl >= 1e-3, 1e-4 * kl, 1e-2 * kl) + 1e-7;
  EXPECT_LE((rows.kl - kl).abs().sub(allowed).max().item<double>(), 0.0);
}

/// A head whose logits spread over more than float can hold in one frame of reference is left to the dense kernels,
/// and its neighbour is not.
TEST(EmulatedTriangularRows, WideHeadsAreLeftOut) {
  auto [student, teacher] = testing::student_and_teacher(1, 2, 140, 64, at::kBFloat16);
  student.select(1, 1).narrow(1, 0, 1).mul_(20);
  teacher.select(1, 1).narrow(1, 0, 1).mul_(20);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto [rows, listed] = run_forward(problem, Traversal::kTriangular);
  EXPECT_EQ(listed, 140);
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  EXPECT_LE(testing::row_excess(rows.lse_teacher, std::get<2>(exact)), 0.0);
  const auto [gradient, wide_heads] = run_backward(problem, Traversal::kTriangular, at::ones_like(rows.kl), rows);
  EXPECT_EQ(wide_heads[0].item<int64_t>(), 0);
  EXPECT_EQ(wide_heads[1].item<int64_t>(), 1);
}

/// Spread of 150 nats within a head, as real models have it.
TEST(EmulatedTriangularRows, OutlierTokensKeepTheirDigits) {
  at::Tensor teacher = testing::gaussian(1, 1, 260, 64, 7) * 0.7;
  const at::Tensor outliers = teacher.narrow(2, 0, 2);
  outliers.mul_(std::sqrt(150.0 * 8) / at::linalg_vector_norm(outliers, 2, -1, true));
  teacher = teacher.to(at::kBFloat16);
  const at::Tensor student = (teacher.to(at::kDouble) + 0.02 * testing::gaussian(1, 1, 260, 64, 8)).to(at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto [rows, listed] = run_forward(problem, Traversal::kTriangular);
  EXPECT_LT(listed, 26);
  const at::Tensor exact_student = student.to(at::kDouble).requires_grad_();
  const auto exact = testing::reference_relation(exact_student, teacher, {});
  const at::Tensor& kl = std::get<0>(exact);
  EXPECT_GT((std::get<2>(exact).max() - std::get<2>(exact).min()).item<double>(), 100.0);
  const at::Tensor allowed = at::where(kl >= 1e-3, 1e-4 * kl, 1e-2 * kl) + 1e-7;
  EXPECT_LE((rows.kl - kl).abs().sub(allowed).max().item<double>(), 0.0);
  const at::Tensor weights = at::ones_like(rows.kl);
  const auto [gradient, wide_heads] = run_backward(problem, Traversal::kTriangular, weights, rows);
  EXPECT_EQ(wide_heads.sum().item<int64_t>(), 0);
  kl.sum().backward();
  EXPECT_LE(testing::relative_error(gradient, exact_student.grad()), testing::gradient_promise(at::kBFloat16));
}

/// The gradient of a mean is one number in memory: the same bits as a number for each row.
TEST(EmulatedTriangularRows, OneGradientForAllRows) {
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf}) {
    const auto [student, teacher] = testing::student_and_teacher(1, 2, 200, type == at::kHalf ? 128 : 64, type);
    const KernelProblem problem = testing::relation_problem(student, teacher);
    const auto rows = run_forward(problem, Traversal::kRows).result;
    const at::Tensor weight = at::full({1}, -3e-4, at::kFloat);
    const auto gradient_for = [&](const at::Tensor& weights) {
      return run_backward(problem, Traversal::kRows, weights, rows).gradient;
    };
    const at::Tensor one = weight.expand_as(rows.kl);
    EXPECT_TRUE(at::equal(gradient_for(one), gradient_for(one.contiguous())));
  }
}

/// The steps around the kernels where a head has several blocks of each, and its largest logits lie in the last.
TEST(EmulatedTriangularRows, StepsTakeManyTokens) {
  constexpr int64_t kTokens = 9000;
  auto [student, teacher] = testing::student_and_teacher(1, 2, kTokens, 8, at::kBFloat16);
  teacher.select(1, 1).select(1, kTokens - 1).fill_(16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto params = params_of<cuda::TriangularForwardParams>(problem, Traversal::kTriangular);
  const auto memory = [&](int64_t floats) { return at::full({2, floats}, NAN, at::kFloat); };
  const auto ints = [](at::IntArrayRef shape) { return at::full(shape, -1, at::kInt); };
  const at::Tensor sums = memory(cuda::kSums * kTokens);
  const at::Tensor token_values = memory(2 * kTokens);
  const at::Tensor own = memory(2 * kTokens);
  const at::Tensor centers = memory(1);
  const at::Tensor wide = ints({2});
  const at::Tensor counts = ints({2});
  const at::Tensor largest = ints({2, (kTokens + 63) / 64});
  const at::Tensor marks = testing::clear_marks(2, kTokens).fill_(-1);
  ASSERT_EQ(cuda::triangular::prepare_forward(
                {params.student, params.teacher, params.batch, params.heads, params.tokens, params.mask,
                 problem.scale_student(), problem.scale_teacher(), largest.mutable_data_ptr<int>(),
                 reinterpret_cast<cuda::ForwardToken*>(token_values.mutable_data_ptr<float>()),
                 reinterpret_cast<cuda::OwnLogit*>(own.mutable_data_ptr<float>()), centers.mutable_data_ptr<float>(),
                 wide.mutable_data_ptr<int>(), sums.mutable_data_ptr<float>(), counts.mutable_data_ptr<int>(),
                 marks.mutable_data_ptr<int>()},
                nullptr),
            cudaSuccess);
  EXPECT_EQ(sums.abs().sum().item<double>() + marks.abs().sum().item<double>(), 0);
  const auto squares = [](const at::Tensor& x, double scale) {
    return x.to(at::kDouble).square().sum(-1).view({2, kTokens}) * (scale * 1.4426950408889634);
  };
  const at::Tensor t = squares(teacher, problem.scale_teacher());
  const at::Tensor x = squares(student, problem.scale_student()) - t;
  EXPECT_TRUE(at::equal(own.view({2, kTokens, 2}), at::stack({t, x}, 2).to(at::kFloat)));
  EXPECT_TRUE(at::equal(centers.flatten(), t.amax(1).to(at::kFloat) / 4));
  EXPECT_TRUE(at::equal(wide, (t.amax(1) >= cuda::kLargestSpread * 1.4426950408889634).to(at::kInt)));
  EXPECT_EQ(wide.sum().item<int64_t>(), 1);
  const at::Tensor values = token_values.view({2, kTokens, 2});
  EXPECT_TRUE(at::allclose(values.select(2, 1), at::exp2(t / 2 - t.amax(1, true) / 4).to(at::kFloat), 1e-4, 0));

  const at::Tensor lse = at::linspace(1, 100, 2 * kTokens, at::kFloat).view({2, kTokens}).contiguous();
  lse[1][kTokens - 1] = 300;
  const at::Tensor moved = lse + 1;
  const at::Tensor grads = at::linspace(-1, 1, 2 * kTokens, at::kFloat);
  const at::Tensor backward_values = memory(4 * kTokens);
  const at::Tensor gradient = memory(8 * kTokens);
  wide.fill_(-1);
  marks.fill_(-1);
  ASSERT_EQ(cuda::triangular::prepare_backward(
                {1, 2, problem.memory.visibility, grads.const_data_ptr<float>(), false, moved.const_data_ptr<float>(),
                 lse.const_data_ptr<float>(), nullptr,
                 reinterpret_cast<cuda::BackwardToken*>(backward_values.mutable_data_ptr<float>()),
                 wide.mutable_data_ptr<int>(), nullptr, gradient.mutable_data_ptr<float>(), gradient.numel(),
                 marks.mutable_data_ptr<int>()},
                nullptr),
            cudaSuccess);
  EXPECT_EQ(gradient.abs().sum().item<double>() + marks.abs().sum().item<double>(), 0);
  EXPECT_EQ(wide[0].item<int>(), 0);
  EXPECT_EQ(wide[1].item<int>(), 1);
  const at::Tensor made = backward_values.view({2, kTokens, 4});
  EXPECT_TRUE(at::allclose(made.select(2, 0), lse * 0.72134752f - cuda::kHeadroom / 2, 1e-6, 1e-5));
  EXPECT_TRUE(at::allclose(made.select(2, 1) * made.select(2, 2),
                           grads.view({2, kTokens}) * std::exp2(-cuda::kHeadroom), 1e-4, 0));
  EXPECT_TRUE(at::allclose(made.select(2, 3), std::exp(-1.0) * made.select(2, 2), 1e-4, 0));

  const at::Tensor exact = at::linspace(-5, 5, gradient.numel(), at::kFloat).view_as(gradient);
  gradient.copy_(exact);
  gradient[0][8 * 8191 + 3] = INFINITY;
  wide.zero_();
  const at::Tensor result = at::full({2, 8 * kTokens}, NAN, at::kBFloat16);
  ASSERT_EQ(cuda::triangular::finish_backward(
                {cuda::Scalar::kBFloat16, 1, 2, kTokens, 8, 0.5, nullptr, wide.const_data_ptr<int>(),
                 gradient.const_data_ptr<float>(), result.mutable_data_ptr(), marks.mutable_data_ptr<int>()},
                nullptr),
            cudaSuccess);
  const at::Tensor expected = (exact * 0.5).to(at::kBFloat16);
  expected[0][8 * 8191 + 3] = 3.3895313892515355e38;
  EXPECT_TRUE(at::equal(result, expected));
  EXPECT_EQ(marks.sum().item<int64_t>(), 2);
  EXPECT_EQ(marks[0].item<int>() + marks[1 + 8191 / 64].item<int>(), 2);
}

/// Whatever warp goes first: the traversal by rows gives the same bits, and no barrier is missing.
TEST(EmulatedTriangularRows, ScheduleDoesNotMatterByRows) {
  const auto [student, teacher] = testing::student_and_teacher(1, 1, 160, 64, at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto first = run_forward(problem, Traversal::kRows).result;
  const at::Tensor weights = at::ones_like(first.kl);
  const at::Tensor gradient = run_backward(problem, Traversal::kRows, weights, first).gradient;
  const auto exact = testing::reference_relation(student.to(at::kDouble), teacher, {});
  for (const uint32_t seed : {1u, 2u}) {
    emulation::set_schedule(seed);
    EXPECT_TRUE(at::equal(run_forward(problem, Traversal::kRows).result.kl, first.kl));
    EXPECT_TRUE(at::equal(run_backward(problem, Traversal::kRows, weights, first).gradient, gradient));
    const auto triangular = run_forward(problem, Traversal::kTriangular).result;
    EXPECT_LE(testing::row_excess(triangular.kl, std::get<0>(exact)), 0.0);
  }
  emulation::set_schedule(0);
}

}  // namespace
}  // namespace linearard
