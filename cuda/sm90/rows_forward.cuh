#pragma once

#include <algorithm>

#include "descriptors.cuh"
#include "instructions.cuh"
#include "operands.cuh"
#include "rows.h"
#include "rows_sums.cuh"
#include "schedule.cuh"

// The row-wise forward: 128 owners of a block, 64 for each warpgroup, are the rows of the products, and the others
// visit them, 64 at a time.

namespace linearard::cuda::sm90 {

struct RowsForwardArguments {
  CUtensorMap own_student;
  CUtensorMap own_teacher;
  CUtensorMap other_student;
  CUtensorMap other_teacher;
  RowsForwardParams params;
  Schedule schedule;
};

/// @tparam Rows RelationRows or AttentionRows
template <typename T, int kDim, typename Rows>
class RowsForward {
 public:
  static constexpr int kOwners = kGroups * kTileTokens;

 private:
  static constexpr int kElements = kTileTokens / 2;  ///< accumulators of a thread, of either product
  static constexpr int kChunks = kDim / kChunkDims;
  static constexpr int kSteps = kDim / kStep;
  static constexpr int kOwnerChunk = kOwners * kLineBytes;
  static constexpr int kVisitorChunk = kTileTokens * kLineBytes;
  /// Steps of the sum whose owners' vectors of the teacher stay in registers, which spares shared memory's bandwidth.
  static constexpr int kRegisterSteps = kDim > 128 ? 0 : std::min(kSteps, Rows::kRegisterSteps);
  // A stage holds the visitors' vectors of one side: first the teacher's, then the student's.
  static constexpr int kStages = kDim <= 128 ? 8 : 3;
  static constexpr int kStageBytes = kChunks * kVisitorChunk;
  static constexpr int kOwnerTeacher = kChunks * kOwnerChunk;
  static constexpr int kRing = 2 * kOwnerTeacher;
  static constexpr int kBarriers = kRing + kStages * kStageBytes;

 public:
  static constexpr int kSharedBytes = kBarriers + (1 + 2 * kStages) * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static void run(const RowsForwardArguments& arguments) {
    const Walk walk = Walk::of_block(arguments.schedule, static_cast<int>(blockIdx.x));
    wait_for_kernels_ahead();
    if (arguments.params.wide_heads != nullptr && arguments.params.wide_heads[walk.head] != 0) return;
    RowsForward(arguments, walk).run_block();
  }

 private:
  using Position = RingPosition<kStages>;

  const RowsForwardArguments& arguments_;
  const RowsForwardParams& p_;
  char* const memory_;
  const uint32_t shared_;
  const int head_;
  const int first_;  ///< owner
  int tiles_;        ///< of visitors, two at a time; one that does not exist is zeros

  __device__ RowsForward(const RowsForwardArguments& arguments, const Walk& walk)
      : arguments_(arguments),
        p_(arguments.params),
        memory_(dynamic_shared_memory()),
        shared_(shared_address(memory_)),
        head_(walk.head),
        // Causal, the last rows have the longest walks.
        first_((p_.causal ? arguments.schedule.token_blocks - 1 - walk.token_block : walk.token_block) * kOwners) {
    const int end = p_.causal ? max(0, min(first_ + kOwners + p_.offset, p_.others)) : p_.others;
    tiles_ = (end + 2 * kTileTokens - 1) / (2 * kTileTokens) * 2;
  }

  __device__ uint32_t owners_loaded() const { return shared_ + kBarriers; }
  __device__ uint32_t full(int stage) const { return shared_ + kBarriers + 8 + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ uint32_t stage_at(int stage) const { return shared_ + kRing + stage * kStageBytes; }

  __device__ void run_block() {
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
      Consumer(*this, group - 1).run();
    }
  }

  // --- the producer: one thread
  // ---------------------------------------------------------------------------------------

  __device__ void load_visitors(const CUtensorMap& map, Position& position, int tile, int head, int batch) const {
    const int s = position.stage;
    mbarrier_wait(empty(s), position.parity ^ 1);
    mbarrier_arrive_expect(full(s), kStageBytes);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      tma_load_4d(stage_at(s) + chunk * kVisitorChunk, &map, full(s), chunk * kChunkDims, tile * kTileTokens, head,
                  batch);
    }
    position.advance();
  }

  __device__ void produce() const {
    prefetch_tensor_map(&arguments_.own_student);
    prefetch_tensor_map(&arguments_.own_teacher);
    prefetch_tensor_map(&arguments_.other_student);
    prefetch_tensor_map(&arguments_.other_teacher);
    const int batch = head_ / p_.heads;
    const int head = head_ % p_.heads;
    mbarrier_arrive_expect(owners_loaded(), 2 * kOwnerTeacher);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int token = 0; token < kOwners; token += kTileTokens) {
        const uint32_t to = shared_ + chunk * kOwnerChunk + token * kLineBytes;
        tma_load_4d(to + kOwnerTeacher, &arguments_.own_teacher, owners_loaded(), chunk * kChunkDims, first_ + token,
                    head, batch);
        tma_load_4d(to, &arguments_.own_student, owners_loaded(), chunk * kChunkDims, first_ + token, head, batch);
      }
    }
    Position position;
    for (int tile = 0; tile < tiles_; ++tile) {
      load_visitors(arguments_.other_teacher, position, tile, head / p_.group, batch);
      load_visitors(arguments_.other_student, position, tile, head / p_.group, batch);
    }
  }

  // --- the consumers: two warpgroups
  // ----------------------------------------------------------------------------------

  /// Products of one tile.
  struct Products {
    float student[kElements];
    float teacher[kElements];

    __device__ void clear() {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        student[i] = teacher[i] = 0;
      pin_all();
    }
    __device__ void pin_all() {
      pin(student);
      pin(teacher);
    }
  };

  class Consumer {
   public:
    __device__ Consumer(const RowsForward& block, int group) : b_(block), group_(group), factors_(block.p_.factors) {}

    __device__ void run() {
      mbarrier_wait(b_.owners_loaded(), 0);
      const uint32_t from =
          swizzled(b_.shared_ + kOwnerTeacher, group_ * kTileTokens + warp_of_group() * 16 + lane() % 16, lane() / 16);
#pragma unroll
      for (int step = 0; step < kRegisterSteps; ++step) {
        load_matrices(owners_[step], swizzled_step(from + step / kStepsOfChunk * kOwnerChunk, step % kStepsOfChunk));
      }
      rows_.begin(b_.p_, b_.head_, b_.first_ + group_ * kTileTokens);
      Products even;
      Products odd;
      // Before the first product: written between products, accumulators would make them wait for each other.
      even.clear();
      odd.clear();
      multiply(even, b_.tiles_ > 0);
      done(even, b_.tiles_ > 0);
#pragma unroll 1
      for (int tile = 0; tile < b_.tiles_; tile += 2) {
        visit(even, odd, tile);
        visit(odd, even, tile + 1);
      }
      let_next_kernel_begin();
      rows_.write(b_.p_, b_.head_, b_.first_ + group_ * kTileTokens);
    }

   private:
    static constexpr int kStepsOfChunk = kChunkDims / kStep;

    const RowsForward& b_;
    const int group_;
    const ElementFactors factors_;
    uint32_t owners_[kRegisterSteps > 0 ? kRegisterSteps : 1][4];  ///< the teacher's vectors of the group's owners
    Rows rows_;
    Position position_;       ///< of the next tile's teacher, whose products come next
    int stages_[2] = {0, 0};  ///< of the products under way

    __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

    __device__ int next_stage() {
      const int stage = position_.stage;
      mbarrier_wait(b_.full(stage), position_.parity);
      position_.advance();
      return stage;
    }

    /// Owners x visitors of the next tile: issued, not waited for. Where there is none, the last one's again, which
    /// nobody reads: a product on one path only takes registers on all.
    __device__ void multiply(Products& products, bool exists) {
      if (exists) stages_[0] = next_stage();
      multiply(products.teacher, true);
      if (exists) stages_[1] = next_stage();
      multiply(products.student, false);
      warpgroup_commit();
    }
    __device__ void multiply(float (&products)[kElements], bool teacher) {
      const Operand<kVisitorChunk> visitors(b_.stage_at(stages_[teacher ? 0 : 1]));
      const Operand<kOwnerChunk> owners(b_.shared_ + (teacher ? kOwnerTeacher : 0) + group_ * kTileTokens * kLineBytes);
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint64_t b = visitors.at(dimension_step<kVisitorChunk>(step));
        if (teacher && step < kRegisterSteps) {
          wgmma<T, false>(products, owners_[step < kRegisterSteps ? step : 0], b, step > 0);
        } else {
          wgmma<T, false, false>(products, owners.at(dimension_step<kOwnerChunk>(step)), b, step > 0);
        }
      }
    }

    __device__ void done(Products& products, bool exists) const {
      warpgroup_wait<0>();
      products.pin_all();
      if (exists && lane() == 0) {
        mbarrier_arrive(b_.empty(stages_[0]));
        mbarrier_arrive(b_.empty(stages_[1]));
      }
    }

    /// Adds the pairs of a tile while the next one's products are made. All are waited for: ptxas follows no product
    /// through a loop's end.
    __device__ void visit(Products& products, Products& next, int tile) {
      const bool exists = tile + 1 < b_.tiles_;
      multiply(next, exists);
      rows_.add(b_.p_, products.student, products.teacher, factors_, b_.head_, b_.first_ + group_ * kTileTokens,
                tile * kTileTokens);
      done(next, exists);
    }
  };
};

template <typename T, int kDim, typename Rows>
__global__ void __launch_bounds__(kThreads, 1)
    rows_forward_kernel(const __grid_constant__ RowsForwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  RowsForward<T, kDim, Rows>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
