#pragma once

#include "../triangular/params.h"
#include "descriptors.cuh"
#include "instructions.cuh"
#include "rows_pairs.cuh"
#include "schedule.cuh"

// The row-wise backward: H X for 128 owners of a block, 64 for each warpgroup. Their gradient stays in registers for
// the whole walk over all tokens, 64 at a time, and is written once: the same bits in every run.

namespace linearard::cuda::sm90 {

struct RowsBackwardArguments {
  CUtensorMap student;
  CUtensorMap teacher;
  CUtensorMap token_values;
  TriangularBackwardParams params;
  Schedule schedule;
};

template <typename T, int kDim>
class RowsBackward {
  static_assert(kDim == 64 || kDim == 128, "the registers of a larger gradient are missing for the next products");

 public:
  static constexpr int kOwners = kGroups * kTileTokens;

 private:
  static constexpr int kElements = kTileTokens / 2;  ///< accumulators of a thread, of either product of vectors
  static constexpr int kChunks = kDim / kChunkDims;
  static constexpr int kOwnerChunk = kOwners * kLineBytes;
  static constexpr int kOtherChunk = kTileTokens * kLineBytes;
  // A stage holds the others' vectors of one side: first the teacher's, then the student's, with which values come.
  static constexpr int kStages = 8;
  static constexpr int kStageBytes = kChunks * kOtherChunk;
  static constexpr int kValueBytes = kTileTokens * static_cast<int>(sizeof(BackwardToken));
  static constexpr int kOwnerTeacher = kChunks * kOwnerChunk;
  static constexpr int kRing = 2 * kOwnerTeacher;
  static constexpr int kValues = kRing + kStages * kStageBytes;
  static constexpr int kOwnValues = kValues + kStages / 2 * kValueBytes;
  static constexpr int kBarriers = kOwnValues + kOwners * static_cast<int>(sizeof(BackwardToken));

 public:
  static constexpr int kSharedBytes = kBarriers + (1 + 2 * kStages) * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static void run(const RowsBackwardArguments& arguments) {
    const Walk walk = Walk::of_block(arguments.schedule, static_cast<int>(blockIdx.x));
    if (arguments.params.wide_heads[walk.head] == 0) RowsBackward(arguments, walk).run_block();
  }

 private:
  using Position = RingPosition<kStages>;

  const RowsBackwardArguments& arguments_;
  const TriangularBackwardParams& p_;
  char* const memory_;
  const uint32_t shared_;
  const int head_;
  const int first_;  ///< owner
  const int tiles_;  ///< of others, two at a time; one that does not exist is zeros

  __device__ RowsBackward(const RowsBackwardArguments& arguments, const Walk& walk)
      : arguments_(arguments),
        p_(arguments.params),
        memory_(dynamic_shared_memory()),
        shared_(shared_address(memory_)),
        head_(walk.head),
        first_(walk.token_block * kOwners),
        tiles_((p_.tokens + 2 * kTileTokens - 1) / (2 * kTileTokens) * 2) {}

  __device__ uint32_t owners_loaded() const { return shared_ + kBarriers; }
  __device__ uint32_t full(int stage) const { return shared_ + kBarriers + 8 + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ uint32_t stage_at(int stage) const { return shared_ + kRing + stage * kStageBytes; }

  __device__ BackwardToken own_value(int row) const {
    const int token = first_ + row;
    if (token >= p_.tokens) return {0, 0, 0, 0};
    const auto* values = reinterpret_cast<const float4*>(p_.token_values) + static_cast<int64_t>(head_) * p_.tokens;
    const float4 value = __ldg(values + token);
    return {value.x, value.y, value.z, value.w};
  }
  __device__ BackwardToken* own_values() const { return reinterpret_cast<BackwardToken*>(memory_ + kOwnValues); }

  __device__ void run_block() {
    if (threadIdx.x < kOwners) own_values()[threadIdx.x] = own_value(static_cast<int>(threadIdx.x));
    if (threadIdx.x == 0) {
      mbarrier_init(owners_loaded(), 1);
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(full(s), 1);
        mbarrier_init(empty(s), kConsumerThreads / 32);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (group == 0) {
      give_registers<Registers<kGroups>::kProducer>();
      if (threadIdx.x < 32 && elect_one()) produce();
    } else {
      take_registers<Registers<kGroups>::kConsumer>();
      consume(group - 1);
    }
  }

  // --- the producer: one thread
  // ---------------------------------------------------------------------------------------

  __device__ void load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int chunk, int token) const {
    tma_load_4d(shared, &map, barrier, chunk * kChunkDims, token, head_ % p_.heads, head_ / p_.heads);
  }

  __device__ void produce() const {
    prefetch_tensor_map(&arguments_.student);
    prefetch_tensor_map(&arguments_.teacher);
    prefetch_tensor_map(&arguments_.token_values);
    mbarrier_arrive_expect(owners_loaded(), 2 * kOwnerTeacher);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int token = 0; token < kOwners; token += kTileTokens) {
        const uint32_t to = shared_ + chunk * kOwnerChunk + token * kLineBytes;
        load(to + kOwnerTeacher, arguments_.teacher, owners_loaded(), chunk, first_ + token);
        load(to, arguments_.student, owners_loaded(), chunk, first_ + token);
      }
    }
    Position position;
    for (int tile = 0; tile < tiles_; ++tile) {
      load_others(arguments_.teacher, position, tile, 0);
      position.advance();
      load_others(arguments_.student, position, tile, kValueBytes);
      tma_load_4d(shared_ + kValues + position.stage / 2 * kValueBytes, &arguments_.token_values, full(position.stage),
                  0, tile * kTileTokens, head_, 0);
      position.advance();
    }
  }

  __device__ void load_others(const CUtensorMap& map, const Position& position, int tile, int more_bytes) const {
    const int s = position.stage;
    mbarrier_wait(empty(s), position.parity ^ 1);
    mbarrier_arrive_expect(full(s), kStageBytes + more_bytes);
    for (int chunk = 0; chunk < kChunks; ++chunk)
      load(stage_at(s) + chunk * kOtherChunk, map, full(s), chunk, tile * kTileTokens);
  }

  // --- the consumers: two warpgroups
  // ----------------------------------------------------------------------------------

  struct Consumer {
    const RowsBackward& b;
    const int group;
    Position position;      ///< of the next product of vectors
    int student_stage = 0;  ///< of the tile whose H comes next, or came last
    float student[kElements];
    float gradient[kDim / 2];
    uint32_t h[kElements / 8][4];

    __device__ Consumer(const RowsBackward& block, int number) : b(block), group(number) {}

    /// Owners x others: issued, not waited for.
    __device__ void multiply(float (&products)[kElements], int own, int stage) {
      const uint64_t rows = matrix_descriptor<kOwnerChunk>(b.shared_ + own + group * kTileTokens * kLineBytes);
      const uint64_t columns = matrix_descriptor<kOtherChunk>(b.stage_at(stage));
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < kDim / kStep; ++step) {
        wgmma<T, false, false>(products, rows + dimension_step<kOwnerChunk>(step),
                               columns + dimension_step<kOtherChunk>(step), step > 0);
      }
      warpgroup_commit();
    }

    /// gradient += H x the others' student vectors.
    __device__ void add_product(int stage) {
      const uint64_t x = matrix_descriptor<kOtherChunk>(b.stage_at(stage));
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < kTileTokens / kStep; ++step)
        wgmma<T, true>(gradient, h[step], x + token_step(step), true);
      warpgroup_commit();
    }

    __device__ void release(int stage) const {
      if (threadIdx.x % 32 == 0) mbarrier_arrive(b.empty(stage));
    }

    /// The stage of the next load, once it is there.
    __device__ int next_stage() {
      const int stage = position.stage;
      mbarrier_wait(b.full(stage), position.parity);
      position.advance();
      return stage;
    }

    /// H of tile i, whose products are done, and its product; meanwhile the next tile's are made. All are waited for:
    /// ptxas follows no product through a loop's end.
    __device__ void visit(float (&teacher)[kElements], float (&next)[kElements], int i) {
      // The last time of any stage, and nobody reads the result: a product on one path only takes registers on all.
      const bool last = i + 1 == b.tiles_;
      const int next_teacher = last ? student_stage : next_stage();
      multiply(next, kOwnerTeacher, next_teacher);
      weigh(teacher, i);
      add_product(student_stage);
      const int next_student = last ? student_stage : next_stage();
      multiply(student, 0, next_student);
      warpgroup_wait<0>();
      pin(next);
      pin(student);
      release(student_stage);
      if (!last) release(next_teacher);
      student_stage = next_student;
    }

    __device__ void weigh(const float (&teacher)[kElements], int i) {
      const int row = group * kTileTokens + row_of_thread();
      const int first_row = b.first_ + group * kTileTokens;
      const int first_column = i * kTileTokens;
      const auto* columns =
          reinterpret_cast<const BackwardToken*>(b.memory_ + kValues + student_stage / 2 * kValueBytes) +
          column_of_thread();
      RowTerms terms(b.p_.factors, b.own_values() + row, b.first_ + row);
      if (b.p_.causal && terms.enter(first_row, first_column)) {
        weigh_row_pairs<T, true>(student, teacher, terms, columns, first_column + column_of_thread(), h);
      } else {
        weigh_row_pairs<T, false>(student, teacher, terms, columns, 0, h);
      }
    }

    __device__ void run() {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i)
        gradient[i] = 0;
      pin(gradient);
      mbarrier_wait(b.owners_loaded(), 0);
      float even[kElements];
      float odd[kElements];
      const int teacher_stage = next_stage();
      multiply(even, kOwnerTeacher, teacher_stage);
      student_stage = next_stage();
      multiply(student, 0, student_stage);
      warpgroup_wait<0>();
      pin(even);
      pin(student);
      release(teacher_stage);
#pragma unroll 1
      for (int i = 0; i < b.tiles_; i += 2) {
        visit(even, odd, i);
        visit(odd, even, i + 1);
      }
      pin(gradient);
    }
  };

  __device__ void consume(int group) const {
    Consumer consumer(*this, group);
    consumer.run();
    // Found again: registers are scarce in the walk.
    const Walk walk = Walk::of_block(arguments_.schedule, anew(static_cast<int>(blockIdx.x)));
    const int row = anew(static_cast<int>(threadIdx.x)) / kWarpgroup * kTileTokens - kTileTokens + row_of_thread();
    write(consumer.gradient, walk.head, walk.token_block * kOwners + row);
  }

  __device__ void write(const float (&gradient)[kDim / 2], int head, int first_row) const {
    const int dim = p_.student.dim;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = first_row + 8 * r;
      if (token >= p_.tokens) continue;
      float* to = p_.gradient + (static_cast<int64_t>(head) * p_.tokens + token) * dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = 8 * n + column_of_thread();
        if (d >= dim) continue;
        *reinterpret_cast<float2*>(to + d) = make_float2(gradient[4 * n + 2 * r], gradient[4 * n + 2 * r + 1]);
      }
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    rows_backward_kernel(const __grid_constant__ RowsBackwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  RowsBackward<T, kDim>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
