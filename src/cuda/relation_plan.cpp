#include "cuda/relation_plan.h"

#include <algorithm>
#include <cstdint>

#include <c10/core/DeviceGuard.h>

#include <launch.h>

#include "cuda/problem.h"
#include "cuda/triangular.h"

namespace linearard::cuda {

ExecutionPlan relation_plan(const RelationArguments& arguments) {
  const c10::DeviceGuard guard(arguments.student.device());
  const Problem problem = problem_of(arguments);
  Problem forward = problem;  // as the forward kernels meet it
  if (problem.divergence == linearard::Divergence::kReverseKL) exchange_roles(forward);
  const bool float64 = problem.float64();
  const ForwardParams params = forward_params(forward, nullptr, {});
  const bool tensor_cores = !float64 && uses_tensor_cores(params);
  const TileShape tiles = tiles_of(params);
  const auto blocks = [](int64_t length, int64_t tile) { return (length + tile - 1) / tile; };
  const int64_t problems = problem.batch() * problem.heads();
  const int64_t row_count = problems * problem.rows();
  ExecutionPlan plan;
  plan.backend = "cuda";
  plan.compute_dtype = float64 ? "float64" : "float32";
  plan.tile_rows = tiles.rows;
  plan.tile_columns = tiles.columns;
  plan.tile_count = problems * blocks(problem.rows(), tiles.rows) * blocks(problem.keys(), tiles.columns);
  plan.threads = tensor_cores ? 128 : 256;

  // The allocator rounds every block up to 512 bytes.
  constexpr int64_t kRounding = 512;
  const int64_t visibility = problem.memory.ranges.defined()
                                 ? problem.memory.ranges.numel() * 4 + problem.batch() * (problem.keys() + 1) * 4 +
                                       problem.batch() * problem.keys() + 4 * kRounding
                                 : 0;
  const int64_t marks = (1 + problems * blocks(problem.rows(), kRedoRows)) * 4 + kRounding;
  // Norms of double inputs decide on their scaling: with padding, a number of each token.
  const int64_t token_count = problem.batch() * problem.heads() * std::max(problem.rows(), problem.keys());
  const int64_t norms = float64 ? (problem.memory.visibility.row_mask ? 4 * token_count * 8 : 0) + 128 * kRounding : 0;
  const int64_t ratios = measures_closeness(problem) ? problems * 8 + kRounding : 0;
  const bool centers = problem.divergence != linearard::Divergence::kForwardKL;
  const TriangularWorkspace triangular = triangular_workspace(problem);
  const TriangularWorkspace of_forward = triangular_workspace(forward);
  plan.workspace_bytes_forward = visibility + ratios + (float64 ? norms : marks) + of_forward.forward;
  plan.workspace_bytes_backward =
      visibility + ratios + (centers ? 3 * (row_count * (float64 ? 8 : 4) + kRounding) : 0) +
      (float64 ? norms : marks + std::max((centers ? 3 : 2) * (row_count * 8 + kRounding), triangular.backward)) +
      2 * kRounding;
  plan.instruction_set = !tensor_cores          ? "fused multiply-add"
                         : of_forward.on_hopper ? "tensor cores (wgmma)"
                                                : "tensor cores (mma.sync)";
  plan.traversal = of_forward.forward > 0 && !problem.deterministic ? "triangular" : "dense";
  plan.deterministic = of_forward.forward + triangular.backward == 0 || problem.deterministic;
  return plan;
}

}  // namespace linearard::cuda
