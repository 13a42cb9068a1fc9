#pragma once

#include "../mma/instructions.cuh"
#include "../triangular/params.h"
#include "descriptors.cuh"
#include "instructions.cuh"
#include "pairs.cuh"
#include "schedule.cuh"

// H X of the triangular backward. A block of threads owns 128 tokens, 64 for each warpgroup, and walks over all earlier
// tokens and its own, 64 at a time. A pair's H serves both its tokens: the owners' gradient stays in registers for the
// whole walk, the others' leaves with each tile, and both end in additions in global memory. A pair of a token with
// itself is met by both products, so each gets half of it.

namespace linearard::cuda::sm90 {

struct BackwardArguments {
  CUtensorMap student;
  CUtensorMap teacher;
  CUtensorMap token_values;
  TriangularBackwardParams params;
  Schedule schedule;
};

template <typename T, int kDim>
class Backward {
  static_assert(kDim == 64 || kDim == 128);

 public:
  static constexpr int kOwners = kGroups * kTileTokens;

 private:
  static constexpr int kStages = 3;
  static constexpr int kSteps = kDim / kStep;
  static constexpr int kElements = kTileTokens / 2;  ///< accumulators of a thread, of either product of vectors
  static constexpr int kChunks = kDim / kChunkDims;
  static constexpr int kOwnerChunk = kOwners * kLineBytes;
  static constexpr int kOtherChunk = kTileTokens * kLineBytes;
  /// Every warpgroup adds up the others' gradient for its chunk of dimensions; with one chunk they take turns.
  static constexpr bool kShareTile = kChunks == kGroups;
  // Gradients on their way out: 64 tokens x 64 dimensions of float for each warpgroup. Lines are padded so that 8 of
  // them, as a warp writes them, lie in different banks.
  static constexpr int kOutLine = kChunkDims * static_cast<int>(sizeof(float)) + 32;
  static constexpr int kOutBytes = kGroups * kTileTokens * kOutLine;

  // The owners' teacher vectors of the first chunk move to registers at once, as many as are free, which spares shared
  // memory's bandwidth; gradients leave from where they were.
  static constexpr int kRegisterSteps = kChunkDims / kStep;
  static constexpr int kTeacherRest = kChunks * kOwnerChunk;
  static constexpr int kOut = kTeacherRest + (kChunks - 1) * kOwnerChunk;
  static constexpr int kH = kOut + std::max(kOutBytes, kOwnerChunk);
  static constexpr int kHBytes = kOwners * kLineBytes;
  static constexpr int kRing = kH + 2 * kHBytes;
  static constexpr int kStageTeacher = kChunks * kOtherChunk;
  static constexpr int kStageValues = 2 * kStageTeacher;
  static constexpr int kStageBytes = kStageValues + kTileTokens * static_cast<int>(sizeof(BackwardToken));
  static constexpr int kOwnerValues = kRing + kStages * kStageBytes;
  static constexpr int kPlan = kOwnerValues + kOwners * static_cast<int>(sizeof(BackwardToken));
  static constexpr int kBarriers = kPlan + 16;
  static_assert(kH % kSwizzleBytes == 0 && kStageBytes % kSwizzleBytes == 0);

 public:
  static constexpr int kSharedBytes = kBarriers + (1 + 2 * kStages + 2 * 2) * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static void run(const BackwardArguments& arguments) {
    const Walk walk = Walk::of_block(arguments.schedule, static_cast<int>(blockIdx.x));
    if (arguments.params.wide_heads[walk.head] != 0) return;
    const Plan plan = plan_of(arguments, walk);
    if (plan.tiles > 0) Backward(arguments, plan).run_block();
  }

 private:
  using Position = RingPosition<kStages>;

  const BackwardArguments& arguments_;
  const TriangularBackwardParams& p_;
  char* const memory_;
  const uint32_t shared_;

  struct Plan {
    int head;
    int first;      ///< owner
    int last_tile;  ///< the walk goes from here to earlier ones
    int tiles;
  };

  __device__ static Plan plan_of(const BackwardArguments& arguments, const Walk& walk) {
    const int first = (arguments.schedule.token_blocks - 1 - walk.token_block) * kOwners;
    const int tiles = (min(first + kOwners, arguments.params.tokens) + kTileTokens - 1) / kTileTokens;
    const int begin = Walk::part_begin(arguments.schedule, walk.part, tiles);
    const int end = Walk::part_begin(arguments.schedule, walk.part + 1, tiles);
    return {walk.head, first, end - 1, end - begin};
  }

  /// The plan waits in shared memory: registers are scarcer.
  __device__ Backward(const BackwardArguments& arguments, const Plan& plan)
      : arguments_(arguments),
        p_(arguments.params),
        memory_(dynamic_shared_memory()),
        shared_(shared_address(memory_)) {
    if (threadIdx.x == 0) *reinterpret_cast<Plan*>(memory_ + kPlan) = plan;
  }

  __device__ const Plan& plan() const { return *reinterpret_cast<const Plan*>(memory_ + kPlan); }
  __device__ uint32_t owners_loaded() const { return shared_ + kBarriers; }
  __device__ uint32_t full(int stage) const { return shared_ + kBarriers + 8 + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ uint32_t h_full(int buffer) const { return full(kStages + buffer); }
  __device__ uint32_t h_empty(int buffer) const { return empty(kStages + buffer); }
  __device__ uint32_t stage_at(int stage) const { return shared_ + kRing + stage * kStageBytes; }
  __device__ uint32_t h_at(int buffer) const { return shared_ + kH + buffer * kHBytes; }

  __device__ void run_block() {
    constexpr int kWarps = kConsumerThreads / 32;
    if (threadIdx.x == 0) {
      mbarrier_init(owners_loaded(), 1);
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(full(s), 1);
        mbarrier_init(empty(s), kWarps);
      }
      for (int b = 0; b < 2; ++b) {
        mbarrier_init(h_full(b), kWarps);
        mbarrier_init(h_empty(b), kShareTile ? kWarps : kWarps / kGroups);
      }
      fence_mbarrier_init();
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (group == 0) {
      give_registers<kProducerRegisters>();
      if (threadIdx.x < 32 && elect_one()) produce();
    } else {
      take_registers<kConsumerRegisters>();
      Consumer(*this, group - 1).run();
    }
  }

  // --- the producer: one thread
  // ---------------------------------------------------------------------------------------

  __device__ void load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int chunk, int token) const {
    tma_load_4d(shared, &map, barrier, chunk * kChunkDims, token, plan().head % p_.heads, plan().head / p_.heads);
  }

  __device__ void produce() const {
    prefetch_tensor_map(&arguments_.student);
    prefetch_tensor_map(&arguments_.teacher);
    prefetch_tensor_map(&arguments_.token_values);
    mbarrier_arrive_expect(owners_loaded(), 2 * kChunks * kOwnerChunk);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int token = 0; token < kOwners; token += kTileTokens) {
        const uint32_t to = shared_ + chunk * kOwnerChunk + token * kLineBytes;
        const int teacher = chunk == 0 ? kOut : kTeacherRest - kOwnerChunk;
        load(to + teacher, arguments_.teacher, owners_loaded(), chunk, plan().first + token);
        load(to, arguments_.student, owners_loaded(), chunk, plan().first + token);
      }
    }
    Position position;
    for (int i = 0; i < plan().tiles; ++i) {
      load_tile((plan().last_tile - i) * kTileTokens, position);
      position.advance();
    }
  }

  __device__ void load_tile(int token, const Position& position) const {
    const uint32_t stage = stage_at(position.stage);
    const uint32_t barrier = full(position.stage);
    mbarrier_wait(empty(position.stage), position.parity ^ 1);
    mbarrier_arrive_expect(barrier, kStageBytes);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      load(stage + chunk * kOtherChunk, arguments_.student, barrier, chunk, token);
      load(stage + kStageTeacher + chunk * kOtherChunk, arguments_.teacher, barrier, chunk, token);
    }
    tma_load_4d(stage + kStageValues, &arguments_.token_values, barrier, 0, token, plan().head, 0);
  }

  class Consumer;
};

/// One warpgroup. Tile i's products of vectors S and T become H, which goes to registers and to shared memory. Its
/// owners' gradient is then summed at once, the others' one tile later, when the other warpgroup's H is certain to be
/// there. The warpgroups use the tensor cores in turns: while one multiplies, the other one computes its H.
template <typename T, int kDim>
class Backward<T, kDim>::Consumer {
 public:
  __device__ Consumer(const Backward& block, int group) : b_(block), group_(group) {}

  __device__ void run() {
    mbarrier_wait(b_.owners_loaded(), 0);
    load_owners();
    barrier_sync(kAllConsumers, kConsumerThreads);

    const ElementFactors factors(b_.p_.factors);
    const PairTerms terms{factors};
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
      weigh(student, teacher, terms, i, position.stage, h);
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
  uint32_t owners_[kRegisterSteps][4];  ///< the teacher's vectors of the group's owners, their first chunk
  float gradient_[kDim / 2];

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ void wait_for_turn() const { sm90::wait_for_turn(group_); }
  __device__ void pass_turn() const { sm90::pass_turn(group_); }
  /// Read again for each tile: registers are scarcer.
  __device__ BackwardToken* owner_values() const { return reinterpret_cast<BackwardToken*>(b_.memory_ + kOwnerValues); }
  __device__ bool is_mine(int i) const { return kShareTile || i % kGroups == group_; }

  __device__ void load_owners() {
    const int row = group_ * kTileTokens + warp_of_group() * 16 + lane() % 16;
    const int token = b_.plan().first + row;
    if (lane() < 16) {
      BackwardToken value{0.f, 0.f, 0.f, 0.f};
      if (token < b_.p_.tokens) value = b_.p_.token_values[static_cast<int64_t>(b_.plan().head) * b_.p_.tokens + token];
      // Causal, a pair has no term in the row of its earlier token: as a row, this token is no key.
      if (b_.p_.causal) value.key = 0.f;
      owner_values()[row] = value;
    }
    const uint32_t from = swizzled(b_.shared_ + kOut, row, lane() / 16);
#pragma unroll
    for (int step = 0; step < kRegisterSteps; ++step)
      load_matrices(owners_[step], swizzled_step(from, step));
  }

  // --- products: issued, not waited for
  // -------------------------------------------------------------------------------

  __device__ void multiply_vectors(float (&student)[kElements],
                                   float (&teacher)[kElements],
                                   const Position& position) const {
    const uint32_t stage = b_.stage_at(position.stage);
    const uint32_t own = b_.shared_ + group_ * kTileTokens * kLineBytes;
    const uint64_t own_student = matrix_descriptor<kOwnerChunk>(own);
    const uint64_t own_teacher = matrix_descriptor<kOwnerChunk>(own + kTeacherRest);
    const uint64_t other_student = matrix_descriptor<kOtherChunk>(stage);
    const uint64_t other_teacher = matrix_descriptor<kOtherChunk>(stage + kStageTeacher);
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
    const uint64_t x = matrix_descriptor<kOtherChunk>(b_.stage_at(stage));
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kTileTokens / kStep; ++step)
      wgmma<T, true>(gradient_, h[step], x + token_step(step), true);
  }

  /// H^T X of all owners, for the group's chunk of dimensions.
  __device__ void sum_others(float (&others)[kElements], int i) const {
    const uint64_t h = matrix_descriptor<kHBytes>(b_.h_at(i & 1));
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
                        const PairTerms& terms,
                        int i,
                        int stage,
                        uint32_t (&h)[kElements / 8][4]) const {
    const auto* columns =
        reinterpret_cast<const BackwardToken*>(b_.memory_ + kRing + stage * kStageBytes + kStageValues) +
        column_of_thread();
    const BackwardToken* own = owner_values() + group_ * kTileTokens + row_of_thread();
    const BackwardToken rows[2] = {own[0], own[8]};
    const int first_column = (b_.plan().last_tile - i) * kTileTokens;
    const int first_row = b_.plan().first + group_ * kTileTokens;
    const Diagonal diagonal{first_row + row_of_thread() - first_column - column_of_thread()};
    if (first_column + kTileTokens <= first_row) {
      weigh_pairs<T, false>(student, teacher, terms, rows, columns, diagonal, 1.f, h);
    } else {
      weigh_pairs<T, true>(student, teacher, terms, rows, columns, diagonal, b_.p_.causal ? 1.f : 0.5f, h);
    }
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

  // --- gradients leave by additions in global memory, each warp for its 16 tokens
  // -------------------------------------

  /// @param values accumulators of 64 dimensions, @param first_token of the group's 64
  __device__ void write(const float* values, int first_token, int chunk) const {
    const bool sends = (lane() & 2) == 0;  // two of the four threads that share two rows, a row each
    char* const out = b_.memory_ + kOut + (group_ * kTileTokens + row_of_thread()) * kOutLine;
    if (sends) bulk_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kChunkDims / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<float2*>(out + 8 * r * kOutLine + (8 * n + column_of_thread()) * 4) =
            make_float2(values[4 * n + 2 * r], values[4 * n + 2 * r + 1]);
      }
    }
    fence_async_proxy();
    __syncwarp();
    if (!sends) return;
    const int row = 8 * (lane() & 1);
    const int token = first_token + row_of_thread() + row;
    const int dims = min(b_.p_.student.dim - chunk * kChunkDims, kChunkDims);
    if (token < b_.p_.tokens && dims > 0) {
      const int64_t at = static_cast<int64_t>(b_.plan().head) * b_.p_.tokens + token;
      reduce_add_bulk(b_.p_.gradient + at * b_.p_.student.dim + chunk * kChunkDims,
                      shared_address(out + row * kOutLine), static_cast<uint32_t>(dims) * 4);
    }
    bulk_commit();
  }

  __device__ void write_others(const float (&others)[kElements], int i) const {
    write(others, (b_.plan().last_tile - i) * kTileTokens, kShareTile ? group_ : 0);
  }

  /// The last tile's others, and the owners.
  __device__ void finish() {
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
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      write(gradient_ + chunk * kElements, b_.plan().first + group_ * kTileTokens, chunk);
    bulk_wait_read<0>();
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ BackwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  Backward<T, kDim>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
