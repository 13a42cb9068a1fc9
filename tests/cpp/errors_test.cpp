#include <functional>
#include <string>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <linearard/linearard.h>

namespace linearard {
namespace {

/// The first line of the error that `call` raises; empty when it raises none.
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// The error begins with the operator and names argument, expectation and what came.
void expect_error(const std::function<void()>& call, const std::string& start, const std::vector<std::string>& parts) {
  const std::string message = message_of(call);
  EXPECT_EQ(message.rfind(start, 0), 0U) << message;
  for (const std::string& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
}

at::Tensor vectors() { return at::randn({2, 3, 5, 4}); }

TEST(Errors, Vectors) {
  const at::Tensor x = vectors();
  expect_error([&] { relation_kl(at::randn({2, 5, 4}), x); }, "relation_kl: student",
               {"4 dimensions", "3", "[2, 5, 4]"});
  expect_error([&] { relation_kl(x, at::randn({2, 5, 4})); }, "relation_kl: teacher", {"4 dimensions", "[2, 5, 4]"});
  expect_error([&] { relation_kl(x.to(at::kLong), x); }, "relation_kl: student", {"float32", "Long"});
  expect_error([&] { relation_kl(x, at::randn({2, 3, 6, 4})); }, "relation_kl: teacher", {"5", "6"});
  expect_error([&] { relation_kl(x, at::randn({2, 3, 5, 8}).slice(3, 0, 8, 2)); }, "relation_kl: teacher",
               {"contiguous", "2"});
  expect_error([&] { relation_kl(at::randn({2, 3, 5, 513}), x); }, "relation_kl: student", {"512", "513"});
  expect_error([&] { relation_kl(x, x.to(at::kMeta)); }, "relation_kl: teacher", {"cpu", "meta"});
  expect_error([&] { relation_kl(at::Tensor(), x); }, "relation_kl: student", {});
  expect_error([&] { relation_kl_forward(x, at::Tensor()); }, "relation_kl_forward: teacher", {});
  expect_error([&] { relation_lse(at::randn({5, 4})); }, "relation_lse: x", {"4 dimensions", "2"});
}

TEST(Errors, Options) {
  const at::Tensor x = vectors();
  const RelationOptions defaults;
  const auto call = [&](const RelationOptions& options) {
    return [&, options] { relation_kl(x, x.clone(), options); };
  };
  expect_error(call(RelationOptions{}.key_padding_mask(at::ones({2, 4}, at::kBool))), "relation_kl: key_padding_mask",
               {"[2, 5]", "[2, 4]"});
  expect_error(call(RelationOptions{}.key_padding_mask(at::ones({2, 5}))), "relation_kl: key_padding_mask",
               {"bool", "Float"});
  expect_error(call(RelationOptions{}.row_weight(at::ones({5}))), "relation_kl: row_weight", {"[2, 5]", "[5]"});
  expect_error(call(RelationOptions{}.scale_student(NAN)), "relation_kl: scale_student", {"finite", "nan"});
  expect_error(call(RelationOptions{}.scale_teacher(INFINITY)), "relation_kl: scale_teacher", {"finite", "inf"});
  expect_error(call(RelationOptions{}.beta(1.0)), "relation_kl: beta", {"(0, 1)", "1"});
  expect_error(call(RelationOptions{}.cu_seqlens(at::tensor({0, 5}, at::kLong))), "relation_kl: cu_seqlens",
               {"1", "2"});
  expect_error(call(RelationOptions{}.num_items(at::ones({2}))), "relation_kl: num_items", {"[2]"});
  expect_error(call(RelationOptions{}.num_items(at::ones({})).reduction(Reduction::kSum)), "relation_kl: num_items",
               {"mean", "sum"});
  expect_error(call(RelationOptions{}.lse_teacher(at::zeros({2, 3, 4}))), "relation_kl: lse_teacher",
               {"[2, 3, 5]", "[2, 3, 4]"});
}

TEST(Errors, BoundariesOfPackedSequences) {
  const at::Tensor x = at::randn({1, 2, 5, 4});
  const auto call = [&](at::TensorOptions dtype, std::vector<int64_t> boundaries) {
    const at::Tensor tensor = at::tensor(boundaries, at::kLong).to(dtype);
    return [&x, tensor] { relation_kl(x, x.clone(), RelationOptions{}.cu_seqlens(tensor)); };
  };
  expect_error(call(at::kInt, {0, 3, 3, 5}), "relation_kl: cu_seqlens", {"increasing", "3"});
  expect_error(call(at::kLong, {0, 4}), "relation_kl: cu_seqlens", {"5", "4"});
  expect_error(call(at::kLong, {1, 5}), "relation_kl: cu_seqlens", {"0", "1"});
  expect_error(call(at::kFloat, {0, 5}), "relation_kl: cu_seqlens", {"int32", "int64"});
  expect_error(call(at::kInt, {}), "relation_kl: cu_seqlens", {});
}

TEST(Errors, UnknownNames) {
  expect_error([] { parse_divergence("kl", "relation_kl"); }, "relation_kl: divergence",
               {"forward_kl", "reverse_kl", "jsd", "kl"});
  expect_error([] { parse_reduction("batchmean", "attention_kl"); }, "attention_kl: reduction",
               {"none", "sum", "mean", "batchmean"});
}

TEST(Errors, ATeacherThatRequiresGradIsToldToDetach) {
  const at::Tensor teacher = vectors().requires_grad_();
  expect_error([&] { relation_kl(vectors(), teacher); }, "relation_kl: teacher", {"detach"});
  expect_error([&] { attention_kl(vectors(), vectors(), teacher, vectors()); }, "attention_kl: query_teacher",
               {"detach"});
  const at::NoGradGuard no_grad;
  EXPECT_NO_THROW(relation_kl(vectors(), teacher));
}

TEST(Errors, Attention) {
  const at::Tensor x = vectors();
  expect_error([&] { attention_kl(x, at::randn({2, 2, 5, 4}), x, x); }, "attention_kl: key_student", {"3", "2"});
  expect_error([&] { attention_kl(x, at::randn({2, 3, 5, 8}), x, x); }, "attention_kl: key_student", {"4", "8"});
  expect_error([&] { attention_kl(x, x, at::randn({2, 3, 6, 4}), x); }, "attention_kl: query_teacher", {"5", "6"});
  expect_error([&] { attention_kl(x, x, x, at::randn({2, 3, 6, 4})); }, "attention_kl: key_teacher", {"5", "6"});
}

TEST(Errors, RowsOfTheBackward) {
  const at::Tensor x = vectors();
  const at::Tensor rows = at::zeros({2, 3, 5});
  expect_error([&] { relation_kl_backward(at::zeros({2, 3}), x, x, rows, rows); }, "relation_kl_backward: grad_kl",
               {"[2, 3, 5]", "[2, 3]"});
  expect_error([&] { relation_kl_backward(rows, x, x, at::zeros({2, 3, 6}), rows); },
               "relation_kl_backward: lse_student", {"[2, 3, 5]", "[2, 3, 6]"});
}

}  // namespace
}  // namespace linearard
