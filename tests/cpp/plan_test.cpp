#include <linearard/plan.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

namespace linearard {
namespace {

at::Tensor vectors(int64_t tokens, at::ScalarType dtype = at::kFloat) { return at::zeros({1, 9, tokens, 64}, dtype); }

TEST(Plan, SaysHowACallIsExecuted) {
  const ExecutionPlan plan = plan_relation_kl(vectors(2048), vectors(2048));
  EXPECT_EQ(plan.backend, "cpu");
  EXPECT_EQ(plan.compute_dtype, "float32");
  EXPECT_TRUE(plan.traversal == "triangular" || plan.traversal == "dense") << plan.traversal;
  EXPECT_GT(plan.tile_rows, 0);
  EXPECT_GT(plan.tile_columns, 0);
  EXPECT_GE(plan.threads, 1);
  EXPECT_LE(plan.threads, at::get_num_threads());
}

TEST(Plan, Float64InputsComputeInFloat64) {
  EXPECT_EQ(plan_relation_kl(vectors(8, at::kDouble), vectors(8)).compute_dtype, "float64");
  EXPECT_EQ(plan_relation_kl(vectors(8), vectors(8, at::kDouble)).compute_dtype, "float64");
  EXPECT_EQ(plan_relation_kl(vectors(8, at::kBFloat16), vectors(8, at::kHalf)).compute_dtype, "float32");
}

TEST(Plan, MemoryIsLinearInTheNumberOfTokens) {
  // Tile buffers of a few MiB for each thread, and vectors: never more than D + 8 numbers for each token and head.
  for (int64_t tokens = 64; tokens <= 32768; tokens *= 2) {
    const ExecutionPlan plan = plan_relation_kl(vectors(tokens), vectors(tokens));
    const int64_t largest = 8 * 1024 * 1024 * plan.threads + 4 * 9 * tokens * (64 + 8);
    EXPECT_LE(plan.workspace_bytes_forward, largest) << tokens;
    EXPECT_LE(plan.workspace_bytes_backward, largest) << tokens;
  }
}

TEST(Plan, WorkIsQuadraticInTheNumberOfTokens) {
  const auto tiles = [](int64_t tokens) { return plan_relation_kl(vectors(tokens), vectors(tokens)).tile_count; };
  EXPECT_NEAR(static_cast<double>(tiles(32768)) / static_cast<double>(tiles(16384)), 4.0, 0.1);
}

TEST(Plan, DeterministicIsHonoured) {
  EXPECT_TRUE(plan_relation_kl(vectors(512), vectors(512), RelationOptions{}.deterministic(true)).deterministic);
}

TEST(Plan, ChecksItsArguments) {
  EXPECT_THROW(plan_relation_kl(vectors(8), vectors(9)), c10::Error);
  EXPECT_THROW(plan_relation_kl(vectors(8), at::zeros({8, 64})), c10::Error);
}

}  // namespace
}  // namespace linearard
