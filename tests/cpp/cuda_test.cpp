#include <linearard/linearard.h>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include "reference.h"

// The CUDA backend against the CPU's: the same call with tensors on either device. Skipped without a GPU.

namespace linearard {
namespace {

using testing::gradient_promise;
using testing::relative_error;
using testing::row_excess;
using testing::student_and_teacher;

class CudaBackend : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "no GPU that torch can use";
  }
};

at::Tensor on_gpu(const at::Tensor& tensor) { return tensor.to(at::kCUDA); }

/// A result of the GPU against the one of the CPU.
void expect_same_rows(const at::Tensor& gpu, const at::Tensor& cpu) {
  EXPECT_TRUE(gpu.is_cuda());
  EXPECT_EQ(gpu.scalar_type(), cpu.scalar_type());
  EXPECT_LE(row_excess(gpu.cpu(), cpu.to(at::kDouble)), 0.0);
}

void expect_same_gradient(const at::Tensor& gpu, const at::Tensor& cpu) {
  EXPECT_TRUE(gpu.is_cuda());
  EXPECT_EQ(gpu.scalar_type(), cpu.scalar_type());
  EXPECT_LE(relative_error(gpu.cpu(), cpu.to(at::kDouble)), gradient_promise(cpu.scalar_type()));
}

at::Tensor weights_for(const at::Tensor& kl) {
  return at::linspace(-0.5, 1.0, kl.numel(), kl.options().device(at::kCPU)).view_as(kl).to(kl.device());
}

/// Forward and backward of relation_kl; `gpu_options` are the options with their tensors on the GPU.
void compare_relation(const at::Tensor& student,
                      const at::Tensor& teacher,
                      const RelationOptions& options,
                      const RelationOptions& gpu_options) {
  const auto [kl, lse_student, lse_teacher] = relation_kl_forward(student, teacher, options);
  const at::Tensor gradient =
      relation_kl_backward(weights_for(kl), student, teacher, lse_student, lse_teacher, options);
  const at::Tensor gpu_student = on_gpu(student);
  const at::Tensor gpu_teacher = on_gpu(teacher);
  const auto [gpu_kl, gpu_lse_student, gpu_lse_teacher] = relation_kl_forward(gpu_student, gpu_teacher, gpu_options);
  expect_same_rows(gpu_kl, kl);
  expect_same_rows(gpu_lse_student, lse_student);
  expect_same_rows(gpu_lse_teacher, lse_teacher);
  expect_same_gradient(relation_kl_backward(weights_for(gpu_kl), gpu_student, gpu_teacher, gpu_lse_student,
                                            gpu_lse_teacher, gpu_options),
                       gradient);
}

TEST_F(CudaBackend, RelationAgreesWithTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    for (const Divergence divergence : {Divergence::kForwardKL, Divergence::kReverseKL, Divergence::kJSD}) {
      for (const bool causal : {false, true}) {
        SCOPED_TRACE(std::string(to_string(divergence)) + " " + at::toString(dtype) + (causal ? " causal" : ""));
        const auto [student, teacher] = student_and_teacher(2, 3, 300, 40, dtype);
        const auto options = RelationOptions{}.divergence(divergence).causal(causal).beta(0.3);
        compare_relation(student, teacher, options, options);
      }
    }
  }
}

TEST_F(CudaBackend, EveryHeadDimension) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    for (const int64_t dimension : {1, 7, 64, 72, 80, 96, 128, 160, 192, 256, 300, 512}) {
      SCOPED_TRACE(std::string(at::toString(dtype)) + " D = " + std::to_string(dimension));
      const auto [student, teacher] = student_and_teacher(1, 2, 150, dimension, dtype);
      compare_relation(student, teacher, {}, {});
    }
  }
}

TEST_F(CudaBackend, MasksAndPackedSequences) {
  const auto [student, teacher] = student_and_teacher(2, 3, 200, 64, at::kBFloat16);
  const at::Tensor mask = at::arange(200).unsqueeze(0) < at::tensor({200, 120}).unsqueeze(1);
  compare_relation(student, teacher, RelationOptions{}.key_padding_mask(mask),
                   RelationOptions{}.key_padding_mask(on_gpu(mask)));
  const at::Tensor boundaries = at::tensor({0, 1, 65, 200}, at::kInt);
  compare_relation(student.narrow(0, 0, 1), teacher.narrow(0, 0, 1), RelationOptions{}.cu_seqlens(boundaries),
                   RelationOptions{}.cu_seqlens(on_gpu(boundaries)));
}

TEST_F(CudaBackend, AttentionAgreesWithTheCpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool causal : {false, true}) {
      SCOPED_TRACE(std::string(at::toString(dtype)) + (causal ? " causal" : ""));
      const auto [query, query_teacher] = student_and_teacher(2, 6, 130, 64, dtype);
      const auto [key, key_teacher] = student_and_teacher(2, 2, 170, 64, dtype);
      const auto options = AttentionOptions{}.causal(causal);
      const auto [kl, lse_student, lse_teacher] = attention_kl_forward(query, key, query_teacher, key_teacher, options);
      const auto [grad_query, grad_key] = attention_kl_backward(weights_for(kl), query, key, query_teacher, key_teacher,
                                                                lse_student, lse_teacher, options);
      const at::Tensor gpu_query = on_gpu(query);
      const at::Tensor gpu_key = on_gpu(key);
      const at::Tensor gpu_query_teacher = on_gpu(query_teacher);
      const at::Tensor gpu_key_teacher = on_gpu(key_teacher);
      const auto [gpu_kl, gpu_lse_student, gpu_lse_teacher] =
          attention_kl_forward(gpu_query, gpu_key, gpu_query_teacher, gpu_key_teacher, options);
      expect_same_rows(gpu_kl, kl);
      expect_same_rows(gpu_lse_student, lse_student);
      expect_same_rows(gpu_lse_teacher, lse_teacher);
      const auto [gpu_grad_query, gpu_grad_key] =
          attention_kl_backward(weights_for(gpu_kl), gpu_query, gpu_key, gpu_query_teacher, gpu_key_teacher,
                                gpu_lse_student, gpu_lse_teacher, options);
      expect_same_gradient(gpu_grad_query, grad_query);
      expect_same_gradient(gpu_grad_key, grad_key);
    }
  }
}

TEST_F(CudaBackend, GradientOfTheMeanReachesTheStudent) {
  const auto [student, teacher] = student_and_teacher(2, 3, 130, 64, at::kBFloat16);
  const at::Tensor leaf = student.detach().requires_grad_();
  relation_kl(leaf, teacher).backward();
  const at::Tensor gpu_leaf = on_gpu(student).requires_grad_();
  const at::Tensor loss = relation_kl(gpu_leaf, on_gpu(teacher));
  loss.backward();
  EXPECT_TRUE(loss.is_cuda());
  expect_same_gradient(gpu_leaf.grad(), leaf.grad());
}

TEST_F(CudaBackend, ThePlanNamesTheBackend) {
  const at::Tensor x = at::zeros({1, 2, 100, 64}, at::TensorOptions().device(at::kCUDA).dtype(at::kBFloat16));
  const ExecutionPlan plan = plan_relation_kl(x, x);
  EXPECT_EQ(plan.backend, "cuda");
  EXPECT_GT(plan.tile_count, 0);
  EXPECT_LE(plan.workspace_bytes_forward, 4 * 2 * 100 * (64 + 8));
  EXPECT_LE(plan.workspace_bytes_backward, 4 * 2 * 100 * (64 + 8));
}

TEST_F(CudaBackend, ATeacherOnTheCpuIsRefused) {
  const auto [student, teacher] = student_and_teacher(1, 2, 10, 8);
  try {
    relation_kl(on_gpu(student), teacher);
    FAIL() << "no error";
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    EXPECT_NE(message.find("cuda:0"), std::string::npos) << message;
    EXPECT_NE(message.find("cpu"), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace linearard
