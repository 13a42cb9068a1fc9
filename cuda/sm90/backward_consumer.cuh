#pragma once

#include "backward.cuh"
#include "rows_gradient.cuh"

// The warpgroups of the backward that compute.

namespace linearard::cuda::sm90 {

/// One warpgroup. Tile i's products of vectors S and T become weights H, which go to registers and to shared memory.
/// Its owners' gradient is then summed at once, the others' one tile later, when the other warpgroup's H is certain to
/// be there. The warpgroups use the tensor cores in turns: while one multiplies, the other one computes its H.
template <typename T, int kDim, typename Form>
class Backward<T, kDim, Form>::Consumer {
 public:
  __device__ Consumer(const Backward& block, int group)
      : b_(block),
        group_(group),
        own_(anew(matrix_descriptor<kOwnerChunk>(block.shared_ + group * kTileTokens * kLineBytes))),
        ring_(anew(matrix_descriptor<kOtherChunk>(block.stage_at(0)))) {}

  __device__ void run() {
    load_owners();
    barrier_sync(kAllConsumers, kConsumerThreads);

    float student[kElements];
    float teacher[kElements];
    uint32_t h[kElements / 8][4];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i)
      gradient_[i] = 0;
    Position position;
    if (group_ == 1) pass_turn();
    wait_for_turn();
    multiply_vectors(student, teacher, position);
    warpgroup_wait<0>();
    pass_turn();
#pragma unroll 1
    for (int i = 0; i < b_.plan().tiles; ++i) {
      pin(student);
      pin(teacher);
      weigh(student, teacher, i, position.stage, h);
      store_h(h, i);
      const int stage = position.stage;
      position.advance();

      wait_for_turn();
      float others[kElements];
      const bool sums_others = i > 0 && is_mine(i - 1);
      // The first time without a result: registers of a product on one path only stay taken on all others.
      if (kShareTile || sums_others) sum_others(others, i - 1);
      sum_owners(h, stage);
      warpgroup_commit();
      if (i + 1 < b_.plan().tiles) multiply_vectors(student, teacher, position);
      if (i + 1 < b_.plan().tiles) {
        warpgroup_wait<1>();
      } else {
        warpgroup_wait<0>();
      }
      if (lane() == 0) mbarrier_arrive(b_.empty(stage));
      if (group_ == 0 || i + 1 < b_.plan().tiles) pass_turn();
      if (sums_others) {
        pin(others);
        release_h(i - 1);
        write_others(others, i - 1);
      }
      warpgroup_wait<0>();
    }
    finish();
  }

 private:
  const Backward& b_;
  const int group_;
  const uint64_t own_;                  ///< descriptors of the group's owners
  const uint64_t ring_;                 ///< and of the first stage, see Forward::Operands
  uint32_t owners_[kRegisterSteps][4];  ///< the teacher's vectors of the group's owners, their first chunks
  float gradient_[kDim / 2];

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ void wait_for_turn() const { sm90::wait_for_turn(group_); }
  __device__ void pass_turn() const { sm90::pass_turn(group_); }
  /// Read again for each tile: registers are scarcer.
  __device__ Value* owner_values() const { return reinterpret_cast<Value*>(b_.memory_ + kOwnerValues); }
  __device__ bool is_mine(int i) const { return is_of_group(i, group_); }

  __device__ void load_owners() {
    const int row = group_ * kTileTokens + warp_of_group() * 16 + lane() % 16;
    if (lane() < 16) owner_values()[row] = Form::own_value(b_.p_, b_.plan().head, b_.plan().first + row);
    mbarrier_wait(b_.owners_loaded(), 0);
    constexpr int kStepsOfChunk = kChunkDims / kStep;
    const uint32_t from = swizzled(b_.shared_ + kOut, row, lane() / 16);
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step)
      load_matrices(owners_[step], swizzled_step(from + step / kStepsOfChunk * kOwnerChunk, step % kStepsOfChunk));
  }

  __device__ uint64_t stage_of(int stage) const { return ring_ + static_cast<uint64_t>(stage * (kStageBytes / 16)); }

  // --- products: issued, not waited for
  // -------------------------------------------------------------------------------

  __device__ void multiply_vectors(float (&student)[kElements],
                                   float (&teacher)[kElements],
                                   const Position& position) const {
    const uint64_t own_student = own_;
    const uint64_t own_teacher = own_ + kTeacherRest / 16;
    const uint64_t other_student = stage_of(position.stage);
    const uint64_t other_teacher = other_student + kStageTeacher / 16;
    mbarrier_wait(b_.full(position.stage), position.parity);
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step)
      wgmma<T, false>(teacher, owners_[step], other_teacher + dimension_step<kOtherChunk>(step), step > 0);
#pragma unroll
    for (int step = kRegisterSteps; step < kSteps; ++step) {
      wgmma<T, false, false>(teacher, own_teacher + dimension_step<kOwnerChunk>(step - kRegisterSteps),
                             other_teacher + dimension_step<kOtherChunk>(step), true);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma<T, false, false>(student, own_student + dimension_step<kOwnerChunk>(step),
                             other_student + dimension_step<kOtherChunk>(step), step > 0);
    }
    warpgroup_commit();
  }

  /// Owners' gradient += H X of the tile.
  __device__ void sum_owners(const uint32_t (&h)[kElements / 8][4], int stage) {
    const uint64_t x = stage_of(stage);
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kTileTokens / kStep; ++step)
      wgmma<T, true>(gradient_, h[step], x + token_step(step), true);
  }

  /// H^T X of all owners, for the group's chunk of dimensions. i < 0: no result, of the owners' vectors instead of H.
  __device__ void sum_others(float (&others)[kElements], int i) const {
    const uint64_t h = matrix_descriptor<kHBytes>(i < 0 ? b_.shared_ : b_.h_at(i & 1));
    const uint64_t x = matrix_descriptor<kOwnerChunk>(b_.shared_ + (kShareTile ? group_ * kOwnerChunk : 0));
    if (i >= 0) mbarrier_wait(b_.h_full(i & 1), i / 2 % 2);
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kOwners / kStep; ++step)
      wgmma<T, true, true>(others, h + token_step(step), x + token_step(step), step > 0);
  }

  // --- H
  // --------------------------------------------------------------------------------------------------------------

  __device__ void weigh(const float (&student)[kElements],
                        const float (&teacher)[kElements],
                        int i,
                        int stage,
                        uint32_t (&h)[kElements / 8][4]) const {
    const auto* columns = reinterpret_cast<const Value*>(b_.memory_ + kRing + stage * kStageBytes + kStageValues);
    const Value* own = owner_values() + group_ * kTileTokens + row_of_thread();
    const Value rows[2] = {own[0], own[8]};
    const int first_column = (b_.plan().last_tile - i) * kTileTokens;
    const int first_row = b_.plan().first + group_ * kTileTokens;
    Form::template weigh<T>(b_.p_, b_.plan().is_plain, student, teacher, rows, columns + column_of_thread(), first_row,
                            first_column, h);
  }

  __device__ void store_h(const uint32_t (&h)[kElements / 8][4], int i) const {
    mbarrier_wait(b_.h_empty(i % 2), (i / 2 + 1) % 2);
    const int row = group_ * kTileTokens + warp_of_group() * 16 + lane() % 16;
    const uint32_t to = swizzled(b_.h_at(i % 2), row, lane() / 16);
#pragma unroll
    for (int step = 0; step < kElements / 8; ++step)
      store_matrices(swizzled_step(to, step), h[step]);
    fence_async_proxy();
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(b_.h_full(i % 2));
  }

  __device__ void release_h(int i) const {
    if (lane() == 0) mbarrier_arrive(b_.h_empty(i % 2));
  }

  // --- gradients on their way out: additions that the senders make of them
  // --------------------------------------------

  /// @param values accumulators of 64 dimensions, @param count of the group's earlier ones
  __device__ void write(const float* values, int count) const {
    mbarrier_wait(b_.out_empty(group_), (count + 1) % 2);
    // A thread writes two floats, half of a piece of 16 bytes, of both its rows.
    constexpr int kTokenBytes = kOutLines * kLineBytes;
    const int piece = column_of_thread() / 4 ^ (row_of_thread() & 3) * kOutLines;
    char* const out = b_.memory_ + (b_.out_at(group_) - b_.shared_) + row_of_thread() * kTokenBytes +
                      column_of_thread() % 4 * static_cast<int>(sizeof(float));
    constexpr int kFragments = kFloatLineDims / 8;
    static_assert(kFragments == 4 && kOutLines == 2);
#pragma unroll
    for (int n = 0; n < kChunkDims / 8; ++n) {
      const int line = n / kFragments;
      char* const to = out + line * kLineBytes + (piece ^ line ^ n % kFragments * 2) * 16;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        *reinterpret_cast<float2*>(to + 8 * r * kTokenBytes) =
            make_float2(values[4 * n + 2 * r], values[4 * n + 2 * r + 1]);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(b_.out_full(group_));
  }

  __device__ void write_others(const float (&others)[kElements], int i) const { write(others, kShareTile ? i : i / 2); }

  /// The last tile's others, and the owners.
  __device__ void finish() {
    // Where the last block of the grid is here, the others have left most multiprocessors.
    let_next_kernel_begin();
    const int last = b_.plan().tiles - 1;
    if (is_mine(last)) {
      float others[kElements];
      sum_others(others, last);
      warpgroup_commit();
      warpgroup_wait<0>();
      pin(others);
      write_others(others, last);
    }
    pin(gradient_);
    if constexpr (Form::kAddsOwners) {
      const int written = count_of_group(last + 1, group_);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
        write(gradient_ + chunk * kElements, written + chunk);
    } else {
      write_gradient<T, kDim>(b_.p_, gradient_, b_.plan().head,
                              b_.plan().first + group_ * kTileTokens + row_of_thread());
    }
  }
};

}  // namespace linearard::cuda::sm90
