#include "../common/half_range.cuh"
#include "../common/instructions.cuh"
#include "../common/launch.cuh"
#include "../common/visibility.cuh"
#include "../common/zeros.cuh"
#include "rows_params.h"

namespace linearard::cuda::sm90 {
namespace {

constexpr int kThreads = 256;

int64_t value_blocks(int64_t count) { return (count + kThreads - 1) / kThreads; }

/// The first blocks make values of rows, the others zeros. The next kernel does not begin before the wait here: what
/// came before has ended then, and it may read vectors at once.
__global__ void __launch_bounds__(kThreads) row_tokens_kernel(const __grid_constant__ RowTokenParams p) {
  wait_for_kernels_ahead();
  let_next_kernel_begin();
  const int64_t zero_block = blockIdx.x - (p.count + kThreads - 1) / kThreads;
  if (zero_block >= 0) {
    write_zeros<kThreads>(p.sums, p.sum_floats, zero_block);
    return;
  }
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.count) return;
  const int row = static_cast<int>(index % p.visibility.rows);
  const float teacher = p.lse_teacher[index];
  // A row that sees one key has no divergence, whatever it is.
  const bool has_gradient = keys_of_row(p.visibility, 0, row).count > 1;
  const float weight = has_gradient ? p.grad_kl[index] * half_range_scale(p.largest_grad) : 0.f;
  p.values[index] = {fmaf(teacher, kLog2E, -kReserve), (p.lse_student[index] - teacher) * kLog2E,
                     weight * exp2f(-kReserve), 0.f};
}

}  // namespace

cudaError_t prepare_row_tokens(const RowTokenParams& params, cudaStream_t stream) {
  const int64_t blocks = value_blocks(params.count) + zero_blocks(params.sum_floats, kThreads);
  return launch_overlapping_blocks(row_tokens_kernel, params, blocks, kThreads, 0, stream);
}

}  // namespace linearard::cuda::sm90
