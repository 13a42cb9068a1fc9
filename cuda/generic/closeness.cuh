#pragma once

#include "tiles.cuh"

namespace linearard::cuda::generic {

/// |ratio x - y|^2 and |y|^2 over the real tokens of one head.
struct Norms {
  double difference = 0;
  double teacher = 0;

  /// Whether student and teacher are so close that s = t + delta keeps the digits of s: far apart it would carry the
  /// rounding of a teacher's logit that may be much larger. The same bound as on the CPU. NaN is not close.
  __device__ bool close() const { return difference < 0.25 * teacher; }
};

/// Of this thread's elements.
__device__ inline Norms norms_of_thread(
    const Vectors& student, const Vectors& teacher, int batch, int head, int count, const uint8_t* mask, double ratio) {
  Norms norms;
  const int64_t student_offset = offset_of_head(student, batch, head);
  const int64_t teacher_offset = offset_of_head(teacher, batch, head);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int token = static_cast<int>(threadIdx.x) / 32; token < count; token += kThreads / 32) {
    if (!is_real(mask, count, batch, token)) continue;
    float far = 0;  // of a token: up to 512 elements
    float size = 0;
#pragma unroll 1  // four types of elements each: unrolled, that takes all registers
    for (int d = lane; d < teacher.dim; d += 32) {
      const float y = read_element<float>(teacher, teacher_offset + token * teacher.token_stride + d);
      const float x = read_element<float>(student, student_offset + token * student.token_stride + d);
      const float apart = difference(ratio, x, y);
      far = fma(apart, apart, far);
      size = fma(y, y, size);
    }
    norms.difference += far;
    norms.teacher += size;
  }
  return norms;
}

/// Over the block, for all its threads; `scratch` holds 2 (kThreads / 32) doubles of shared memory.
__device__ inline Norms sum_of_block(Norms mine, double* scratch) {
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) {
    mine.difference += __shfl_xor_sync(0xffffffffu, mine.difference, lane);
    mine.teacher += __shfl_xor_sync(0xffffffffu, mine.teacher, lane);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[2 * warp] = mine.difference;
    scratch[2 * warp + 1] = mine.teacher;
  }
  __syncthreads();
  Norms all;
  for (int i = 0; i < kThreads / 32; ++i) {
    all.difference += scratch[2 * i];
    all.teacher += scratch[2 * i + 1];
  }
  return all;
}

/// A block for each head: the ratio with which its kernels form s - t as a difference, or 0.
__global__ void __launch_bounds__(kThreads) closeness_kernel(const __grid_constant__ ClosenessParams p) {
  __shared__ double scratch[2 * (kThreads / 32)];
  const int batch = static_cast<int>(blockIdx.x) / p.heads;
  const int head = static_cast<int>(blockIdx.x) % p.heads;
  bool close = sum_of_block(norms_of_thread(p.student_rows, p.teacher_rows, batch, head, p.visibility.rows,
                                            p.visibility.row_mask, p.difference_ratio),
                            scratch)
                   .close();
  if (!p.relation) {
    const Norms keys = sum_of_block(norms_of_thread(p.student_keys, p.teacher_keys, batch, head, p.visibility.keys,
                                                    p.visibility.key_mask, p.difference_ratio),
                                    scratch);
    close = close && keys.close();
  }
  if (threadIdx.x == 0) p.difference_ratios[blockIdx.x] = close ? p.difference_ratio : 0;
}

}  // namespace linearard::cuda::generic
