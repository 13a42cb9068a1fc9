#include <cmath>
#include <tuple>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <emulation/block.h>
#include <instantiations/declarations.h>
#include <instantiations/generic.h>
#include <means.h>

#include "kernel_parameters.h"
#include "reference.h"

// The tensor-core kernels of cuda/mma, and the walk of those of cuda/generic over marked blocks, run on the CPU by
// tests/emulation, against float64.

namespace linearard {
namespace {

using testing::gaussian;
using testing::gradient_promise;
using testing::KernelProblem;
using testing::relative_error;
using testing::row_excess;
using testing::student_and_teacher;

cudaError_t launch(const cuda::ForwardParams& params, at::ScalarType type, int64_t dim) {
  if (type == at::kHalf) {
    return dim <= 64 ? cuda::mma::launch_forward<__half, 64>(params, nullptr)
                     : cuda::mma::launch_forward<__half, 128>(params, nullptr);
  }
  return dim <= 64 ? cuda::mma::launch_forward<__nv_bfloat16, 64>(params, nullptr)
                   : cuda::mma::launch_forward<__nv_bfloat16, 128>(params, nullptr);
}

cudaError_t launch(const cuda::BackwardParams& params, at::ScalarType type, int64_t dim) {
  if (type == at::kHalf) {
    return dim <= 64 ? cuda::mma::launch_backward<__half, 64>(params, nullptr)
                     : cuda::mma::launch_backward<__half, 128>(params, nullptr);
  }
  return dim <= 64 ? cuda::mma::launch_backward<__nv_bfloat16, 64>(params, nullptr)
                   : cuda::mma::launch_backward<__nv_bfloat16, 128>(params, nullptr);
}

testing::ForwardResult run_forward(const KernelProblem& problem) {
  const testing::ForwardResult result = testing::empty_result(problem);
  const at::Tensor& x = problem.student_rows;
  EXPECT_EQ(launch(testing::forward_params(problem, result), x.scalar_type(), x.size(3)), cudaSuccess);
  EXPECT_EQ(result.marks.sum().item<int64_t>(), 0);
  return result;
}

at::Tensor run_backward(cuda::BackwardParams params, const at::Tensor& owners, const at::Tensor& grad_kl) {
  const at::Tensor gradient = at::full_like(owners, std::numeric_limits<double>::quiet_NaN());
  const at::Tensor marks = testing::clear_marks(owners.size(0) * owners.size(1), owners.size(2));
  const at::Tensor largest = grad_kl.abs().max();
  params.gradient = gradient.mutable_data_ptr();
  params.redo = marks.mutable_data_ptr<int>();
  if (owners.scalar_type() == at::kHalf) params.largest_grad = largest.const_data_ptr<float>();
  EXPECT_EQ(launch(params, owners.scalar_type(), owners.size(3)), cudaSuccess);
  EXPECT_EQ(marks.sum().item<int64_t>(), 0);
  return gradient;
}

at::Tensor weights_for(const at::Tensor& kl) { return at::linspace(-0.5, 1.0, kl.numel(), at::kFloat).view_as(kl); }

void expect_rows(const testing::ForwardResult& result, const std::tuple<at::Tensor, at::Tensor, at::Tensor>& exact) {
  EXPECT_LE(row_excess(result.kl, std::get<0>(exact)), 0.0);
  EXPECT_LE(row_excess(result.lse_student, std::get<1>(exact)), 0.0);
  EXPECT_LE(row_excess(result.lse_teacher, std::get<2>(exact)), 0.0);
}

struct RelationCase {
  at::ScalarType type;
  int64_t dim;
  bool causal;
  bool mask;
};

class EmulatedRelation : public ::testing::TestWithParam<RelationCase> {};

TEST_P(EmulatedRelation, AgreesWithFloat64) {
  const RelationCase& c = GetParam();
  const auto [student, teacher] = student_and_teacher(2, 1, 150, c.dim, c.type);
  auto options = RelationOptions{}.causal(c.causal);
  std::optional<at::Tensor> mask;
  if (c.mask) {
    mask = (at::arange(150).unsqueeze(0) < at::tensor({150, 97}).unsqueeze(1)) & (at::arange(150) != 40);
    options.key_padding_mask(*mask);
  }
  const KernelProblem problem = testing::relation_problem(student, teacher, c.causal, mask);
  const auto result = run_forward(problem);
  const at::Tensor exact_student = student.to(at::kDouble).requires_grad_();
  const auto exact = testing::reference_relation(exact_student, teacher, options);
  expect_rows(result, exact);

  const at::Tensor weights = weights_for(result.kl);
  const at::Tensor gradient = run_backward(testing::row_gradient_params(problem, weights, result), student, weights);
  (std::get<0>(exact) * weights).sum().backward();
  EXPECT_LE(relative_error(gradient, exact_student.grad()), gradient_promise(c.type));
}

INSTANTIATE_TEST_SUITE_P(,
                         EmulatedRelation,
                         ::testing::Values(RelationCase{at::kBFloat16, 64, false, false},
                                           RelationCase{at::kBFloat16, 128, true, false},
                                           RelationCase{at::kBFloat16, 64, true, true},
                                           RelationCase{at::kBFloat16, 128, false, true},
                                           RelationCase{at::kHalf, 64, true, false},
                                           RelationCase{at::kHalf, 128, false, false},
                                           RelationCase{at::kBFloat16, 61, false, false},
                                           RelationCase{at::kHalf, 72, true, true}),
                         [](const auto& info) {
                           return std::string(at::toString(info.param.type)) + std::to_string(info.param.dim) +
                                  (info.param.causal ? "Causal" : "Dense") + (info.param.mask ? "Masked" : "");
                         });

/// Forward and both gradients of an attention map in the pair form, against float64.
void expect_attention(const std::tuple<at::Tensor, at::Tensor>& queries,
                      const std::tuple<at::Tensor, at::Tensor>& keys,
                      const KernelProblem& problem,
                      const AttentionOptions& options) {
  const auto result = run_forward(problem);
  const auto& [query, query_teacher] = queries;
  const auto& [key, key_teacher] = keys;
  const at::Tensor exact_query = query.to(at::kDouble).requires_grad_();
  const at::Tensor exact_key = key.to(at::kDouble).requires_grad_();
  const auto exact = testing::reference_attention(exact_query, exact_key, query_teacher, key_teacher, options);
  expect_rows(result, exact);

  const at::Tensor weights = weights_for(result.kl);
  (std::get<0>(exact) * weights).sum().backward();
  const double promise = gradient_promise(query.scalar_type());
  EXPECT_LE(relative_error(run_backward(testing::row_gradient_params(problem, weights, result), query, weights),
                           exact_query.grad()),
            promise);
  EXPECT_LE(relative_error(run_backward(testing::key_gradient_params(problem, weights, result), key, weights),
                           exact_key.grad()),
            promise);
}

TEST(EmulatedAttention, GroupedHeadsAgreeWithFloat64) {
  for (const bool causal : {false, true}) {
    SCOPED_TRACE(causal);
    const auto queries = student_and_teacher(1, 4, 75, 64, at::kBFloat16);
    const auto keys = student_and_teacher(1, 2, 110, 64, at::kBFloat16);
    const auto& [query, query_teacher] = queries;
    const auto& [key, key_teacher] = keys;
    expect_attention(queries, keys, testing::attention_problem(query, key, query_teacher, key_teacher, causal),
                     AttentionOptions{}.causal(causal));
  }
}

/// The first sequence has more keys than queries and the second far fewer: by the whole tensors' lengths, no query
/// would see the first key.
TEST(EmulatedAttention, DiagonalsOfPackedSequences) {
  const auto queries = student_and_teacher(1, 2, 150, 32, at::kBFloat16);
  const auto keys = student_and_teacher(1, 2, 12, 32, at::kBFloat16);
  const auto& [query, query_teacher] = queries;
  const auto& [key, key_teacher] = keys;
  const testing::Boundaries boundaries{at::tensor({0, 3, 150}, at::kLong), at::tensor({0, 8, 12}, at::kLong)};
  expect_attention(queries, keys, testing::attention_problem(query, key, query_teacher, key_teacher, true, boundaries),
                   AttentionOptions{}.causal(true).cu_seqlens(boundaries.rows).cu_seqlens_key(boundaries.keys));
}

/// The mean by one block, and by several.
TEST(EmulatedLists, RowsOfMoreHeadsThanTheGridHasBlocks) {
  constexpr int64_t kHeads = 300;
  constexpr int64_t kRows = 40;
  const auto [student, teacher] = student_and_teacher(1, kHeads, kRows, 16, at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto all = run_forward(problem);

  const at::Tensor counts = at::zeros({kHeads}, at::kInt);
  const at::Tensor lists = at::full({kHeads, kRows}, -1, at::kInt);
  at::Tensor listed = at::zeros({1, kHeads, kRows}, at::kBool);
  for (int64_t head = 3; head < kHeads; head += 37) {
    for (int i = 0; i < 2; ++i) {
      const int64_t row = (head + 17 * i) % kRows;
      lists[head][i] = row;
      listed[0][head][row] = true;
    }
    counts[head] = 2;
  }
  const testing::ForwardResult result = testing::empty_result(problem);
  result.kl.fill_(-1);
  cuda::ForwardParams params = testing::forward_params(problem, result);
  params.row_counts = counts.const_data_ptr<int>();
  params.row_lists = lists.const_data_ptr<int>();
  ASSERT_EQ(launch(params, at::kBFloat16, 16), cudaSuccess);
  EXPECT_TRUE(at::equal(result.kl, at::where(listed, all.kl, -1.f)));

  counts.zero_();
  result.kl.fill_(-1);
  ASSERT_EQ(launch(params, at::kBFloat16, 16), cudaSuccess);
  EXPECT_TRUE((result.kl == -1).all().item<bool>());
}

TEST(EmulatedMean, AgreesWithFloat64) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (const int64_t count : {1, 700, 32768, 32769, 4300000}) {
      const at::Tensor values = (at::arange(count, at::kDouble).sin() + 1.5).to(type);
      const at::Tensor partial = at::full({cuda::kMeanPartials}, NAN, at::kDouble);
      const at::Tensor results = at::full({2}, NAN, type);
      cuda::MeansParams params{};
      params.lists = 1;
      params.type = type == at::kFloat ? cuda::Scalar::kFloat : cuda::Scalar::kDouble;
      params.values[0] = values.const_data_ptr();
      params.counts[0] = count;
      params.partial = partial.mutable_data_ptr<double>();
      params.means = results[0].mutable_data_ptr();
      params.inverse_counts = results[1].mutable_data_ptr();
      EXPECT_EQ(cuda::means(params, nullptr), cudaSuccess);
      const double exact = values.mean(at::kDouble).item<double>();
      const double rounding = type == at::kFloat ? 1e-7 : 1e-14;
      EXPECT_NEAR(results[0].item<double>(), exact, rounding * exact);
      EXPECT_NEAR(results[1].item<double>() * static_cast<double>(count), 1, rounding);
      values.fill_(type == at::kFloat ? 3.4e38 : 1.7e308);
      EXPECT_EQ(cuda::means(params, nullptr), cudaSuccess);
      EXPECT_TRUE(std::isfinite(results[0].item<double>()));
      values[count / 2] = NAN;
      EXPECT_EQ(cuda::means(params, nullptr), cudaSuccess);
      EXPECT_TRUE(std::isnan(results[0].item<double>()));
    }
  }
}

TEST(EmulatedMean, ItsGradientIsAQuotient) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const at::Tensor number = at::full({}, 3, type);
    const at::Tensor result = at::full({}, NAN, type);
    const auto scalar = type == at::kFloat ? cuda::Scalar::kFloat : cuda::Scalar::kDouble;
    EXPECT_EQ(cuda::quotient({scalar, number.const_data_ptr(), 7, result.mutable_data_ptr()}, nullptr), cudaSuccess);
    EXPECT_TRUE(at::equal(result, number / 7));
  }
}

/// The kernels that compute marked blocks again have fewer blocks than there may be marks: each is computed, and no
/// other.
TEST(EmulatedMarks, MarkedBlocksAreComputedAgain) {
  constexpr int64_t kHeads = 70;
  constexpr int64_t kRows = 70;
  const auto [student, teacher] = student_and_teacher(1, kHeads, kRows, 8, at::kFloat);
  const KernelProblem problem = testing::relation_problem(student, teacher);
  const auto empty = [&] {
    testing::ForwardResult result = testing::empty_result(problem);
    for (const at::Tensor& rows : {result.kl, result.lse_student, result.lse_teacher})
      rows.fill_(NAN);
    return result;
  };
  const auto forward = [&](const testing::ForwardResult& to, cuda::Blocks blocks) {
    auto params = testing::forward_params(problem, to);
    EXPECT_EQ(cuda::generic::launch_forward<double>(params, blocks, nullptr), cudaSuccess);
  };
  const testing::ForwardResult all = empty();
  forward(all, cuda::Blocks::kAll);
  EXPECT_LE(row_excess(all.kl, std::get<0>(testing::reference_relation(student.to(at::kDouble), teacher, {}))), 0.0);

  const at::Tensor weights = weights_for(all.kl);
  const auto backward = [&](const at::Tensor& marks, cuda::Blocks blocks) {
    at::Tensor gradient = at::full_like(student, NAN);
    auto params = testing::row_gradient_params(problem, weights, all);
    params.gradient = gradient.mutable_data_ptr();
    params.redo = marks.mutable_data_ptr<int>();
    EXPECT_EQ(cuda::generic::launch_backward<double>(params, blocks, nullptr), cudaSuccess);
    return gradient;
  };
  const at::Tensor gradient = backward(all.marks, cuda::Blocks::kAll);

  // Nothing is marked: nothing is written.
  const testing::ForwardResult none = empty();
  forward(none, cuda::Blocks::kMarked);
  forward(none, cuda::Blocks::kAllIfAnyIsMarked);
  EXPECT_TRUE(at::isnan(none.kl).all().item<bool>());
  EXPECT_TRUE(at::isnan(backward(none.marks, cuda::Blocks::kMarked)).all().item<bool>());

  const testing::ForwardResult some = empty();
  const at::Tensor marked = at::zeros({kHeads, 2}, at::kInt);
  for (const int64_t block : {0, 63, 131, 132, 139})
    marked.view(-1)[block] = 1;
  some.marks[0] = 1;
  some.marks.narrow(0, 1, marked.numel()).copy_(marked.view(-1));
  const at::Tensor rows = marked.repeat_interleave(64, 1).narrow(1, 0, kRows).to(at::kBool).view_as(all.kl);
  const auto expect_rows_of = [&](const at::Tensor& computed, const at::Tensor& exact, const at::Tensor& mask) {
    EXPECT_TRUE(at::equal(at::isnan(computed), mask.logical_not().expand_as(computed)));
    EXPECT_TRUE(at::equal(computed.nan_to_num(0), exact.masked_fill(mask.logical_not(), 0)));
  };
  forward(some, cuda::Blocks::kMarked);
  expect_rows_of(some.kl, all.kl, rows);
  expect_rows_of(some.lse_student, all.lse_student, rows);
  expect_rows_of(backward(some.marks, cuda::Blocks::kMarked), gradient, rows.unsqueeze(-1));
  forward(some, cuda::Blocks::kAllIfAnyIsMarked);
  EXPECT_TRUE(at::equal(some.kl, all.kl));
}

/// Whatever warp goes first, the bits are the same: no sum depends on the order, and no barrier is missing.
TEST(EmulatedSchedule, DoesNotChangeTheResult) {
  const auto [student, teacher] = student_and_teacher(1, 1, 140, 64, at::kBFloat16);
  const KernelProblem problem = testing::relation_problem(student, teacher, true);
  const auto first = run_forward(problem);
  const at::Tensor weights = weights_for(first.kl);
  const auto gradient = [&] {
    return run_backward(testing::row_gradient_params(problem, weights, first), student, weights);
  };
  const at::Tensor first_gradient = gradient();
  for (const uint32_t seed : {1u, 2u, 3u}) {
    emulation::set_schedule(seed);
    EXPECT_TRUE(at::equal(run_forward(problem).kl, first.kl));
    EXPECT_TRUE(at::equal(gradient(), first_gradient));
  }
  emulation::set_schedule(0);
}

}  // namespace
}  // namespace linearard
