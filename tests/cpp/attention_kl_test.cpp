#include <linearard/attention_kl.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <linearard/relation_kl.h>

#include "reference.h"

namespace linearard {
namespace {

using testing::gradient_promise;
using testing::reference_attention;
using testing::relative_error;
using testing::row_excess;
using testing::student_and_teacher;

struct Sizes {
  int64_t query_heads;
  int64_t key_heads;
  int64_t queries;
  int64_t keys;
};

class AttentionKL : public ::testing::TestWithParam<Sizes> {};

TEST_P(AttentionKL, ForwardAndBackwardAgreeWithTheReference) {
  const auto [query_heads, key_heads, queries, keys] = GetParam();
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto [query, query_teacher] = student_and_teacher(2, query_heads, queries, 24, dtype);
    const auto [key, key_teacher] = student_and_teacher(2, key_heads, keys, 24, dtype);
    for (const Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL, Divergence::kJSD}) {
      for (const bool causal : {true, false}) {
        SCOPED_TRACE(std::string(to_string(divergence)) + " " + at::toString(dtype) + (causal ? " causal" : ""));
        const auto options = AttentionOptions{}.divergence(divergence).causal(causal).beta(0.4);
        const auto [kl, lse_student, lse_teacher] =
            attention_kl_forward(query, key, query_teacher, key_teacher, options);
        const at::Tensor query_leaf = query.to(at::kDouble).detach().requires_grad_();
        const at::Tensor key_leaf = key.to(at::kDouble).detach().requires_grad_();
        const at::Tensor exact =
            std::get<0>(reference_attention(query_leaf, key_leaf, query_teacher, key_teacher, options));
        EXPECT_LE(row_excess(kl, exact.detach()), 0.0);

        const at::Tensor weights = at::linspace(0.2, 1.0, kl.numel(), kl.options()).view_as(kl);
        const auto [grad_query, grad_key] =
            attention_kl_backward(weights, query, key, query_teacher, key_teacher, lse_student, lse_teacher, options);
        const auto exact_gradients = torch::autograd::grad({(exact * weights).sum()}, {query_leaf, key_leaf});
        EXPECT_LE(relative_error(grad_query, exact_gradients[0]), gradient_promise(dtype));
        EXPECT_LE(relative_error(grad_key, exact_gradients[1]), gradient_promise(dtype));
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sizes,
    AttentionKL,
    ::testing::Values(Sizes{2, 2, 65, 65}, Sizes{6, 2, 40, 70}, Sizes{4, 1, 70, 40}, Sizes{3, 3, 1, 100}));

TEST(AttentionKL, QueriesWithoutKeysAreZero) {
  auto [query, query_teacher] = student_and_teacher(1, 2, 9, 8);
  const auto [key, key_teacher] = student_and_teacher(1, 2, 4, 8);
  query.requires_grad_();
  const at::Tensor kl =
      attention_kl(query, key, query_teacher, key_teacher, AttentionOptions{}.reduction(Reduction::kNone));
  kl.sum().backward();
  EXPECT_EQ(kl.narrow(2, 0, 5).abs().max().item<double>(), 0.0);
  EXPECT_EQ(query.grad().narrow(2, 0, 5).abs().max().item<double>(), 0.0);
}

TEST(AttentionKL, GradientsReachQueryAndKeyOnly) {
  auto [query, query_teacher] = student_and_teacher(1, 4, 30, 8);
  auto [key, key_teacher] = student_and_teacher(1, 2, 30, 8);
  query.requires_grad_();
  key.requires_grad_();
  attention_kl(query, key, query_teacher, key_teacher).backward();
  EXPECT_EQ(query.grad().sizes(), query.sizes());
  EXPECT_EQ(key.grad().sizes(), key.sizes());
  EXPECT_FALSE(query_teacher.grad().defined());
  EXPECT_FALSE(key_teacher.grad().defined());
}

TEST(AttentionKL, OneTensorAsQueryAndKeyIsTheRelation) {
  auto [student, teacher] = student_and_teacher(1, 2, 60, 16);
  student.requires_grad_();
  attention_kl(student, student, teacher, teacher, AttentionOptions{}.causal(false)).backward();
  const at::Tensor both = student.grad().clone();
  student.mutable_grad().reset();
  relation_kl(student, teacher).backward();
  EXPECT_LE(relative_error(both, student.grad().to(at::kDouble)), gradient_promise(at::kFloat));
}

}  // namespace
}  // namespace linearard
