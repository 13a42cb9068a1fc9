#pragma once

#include "../mma/instructions.cuh"
#include "descriptors.cuh"
#include "instructions.cuh"
#include "pairs.cuh"
#include "schedule.cuh"
#include "tensor_map.h"

// The backward that visits each pair once. A block of threads owns 128 tokens, 64 for each warpgroup, and walks over
// others, 64 at a time. What a pair weighs serves both its tokens: the owners' gradient stays in registers for the
// whole walk, the others' leaves with each tile, as additions in global memory.
//
// Which pairs there are and what they weigh is said by `Form`: those of a relation (backward_relation.cuh), or of two
// sets (backward_sets.cuh).

namespace linearard::cuda::sm90 {

/// What a block does.
struct BackwardPlan {
  int head;       ///< of the owners, of all batch entries
  int first;      ///< owner
  int last_tile;  ///< the walk goes from here to earlier ones
  int tiles;
  bool is_plain;  ///< the head, see BackwardToken
};

/// Vectors of one head.
struct BackwardSource {
  const CUtensorMap* map;
  int batch;
  int head;
};
struct BackwardSources {
  BackwardSource own_student;
  BackwardSource own_teacher;
  BackwardSource other_student;
  BackwardSource other_teacher;
};

template <typename T, int kDim, typename Form>
class Backward {
  static_assert(kDim == 64 || kDim == 128);
  using Arguments = typename Form::Arguments;
  using Params = typename Form::Params;
  using Value = typename Form::Value;
  using Plan = BackwardPlan;

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
  // Gradients on their way out: a box of 64 tokens x 64 dimensions of float for each warpgroup, swizzled. A token has
  // two lines one after the other: the eight rows that a warp writes at once then meet in no bank.
  static constexpr int kOutLines = kChunkDims / kFloatLineDims;
  static constexpr int kOutBox = kTileTokens * kOutLines * kLineBytes;
  static constexpr int kOutBytes = kGroups * kOutBox;

  // The owners' teacher vectors of the first chunks move to registers at once, as many as are free, which spares shared
  // memory's bandwidth; gradients leave from where they were.
  static constexpr int kRegisterChunks = std::min(kChunks, Form::kRegisterChunks);
  static constexpr int kRegisterSteps = kRegisterChunks * kChunkDims / kStep;
  static constexpr int kRegisterBytes = kRegisterChunks * kOwnerChunk;
  static constexpr int kTeacherRest = kChunks * kOwnerChunk;
  static constexpr int kOut = kTeacherRest + (kChunks - kRegisterChunks) * kOwnerChunk;
  static constexpr int kH = kOut + std::max(kOutBytes, kRegisterBytes);
  static constexpr int kHBytes = kOwners * kLineBytes;
  static constexpr int kRing = kH + 2 * kHBytes;
  static constexpr int kStageTeacher = kChunks * kOtherChunk;
  static constexpr int kStageValues = 2 * kStageTeacher;
  static constexpr int kStageBytes =
      kStageValues + (Form::kOtherValues ? kTileTokens * static_cast<int>(sizeof(Value)) : 0);
  static constexpr int kOwnerValues = kRing + kStages * kStageBytes;
  static constexpr int kPlan = kOwnerValues + kOwners * static_cast<int>(sizeof(Value));
  static constexpr int kBarriers = kPlan + 32;
  static_assert(sizeof(Plan) <= 32);
  static_assert(kH % kSwizzleBytes == 0 && kStageBytes % kSwizzleBytes == 0);

 public:
  static constexpr int kSharedBytes = kBarriers + (1 + 2 * kStages + 2 * 2 + 2 * kGroups) * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static void run(const Arguments& arguments) {
    const Walk walk = Walk::of_block(arguments.schedule, static_cast<int>(blockIdx.x));
    const int first = (arguments.schedule.token_blocks - 1 - walk.token_block) * kOwners;
    const int tiles = (Form::end_of_walk(arguments.params, first + kOwners) + kTileTokens - 1) / kTileTokens;
    const int begin = Walk::part_begin(arguments.schedule, walk.part, tiles);
    const int end = Walk::part_begin(arguments.schedule, walk.part + 1, tiles);
    const Plan plan{walk.head, first, end - 1, end - begin, false};
    const Backward backward(arguments, plan);
    // Vectors are what no step of the call writes: they are on their way before the steps ahead have ended.
    if (plan.tiles > 0 && threadIdx.x == 0) backward.begin();
    wait_for_kernels_ahead();
    if (plan.tiles > 0) {
      backward.run_block(Form::is_left_out(arguments.params, walk.head), Form::is_plain(arguments.params, walk.head));
    } else {
      Form::template finish_empty<T, kOwners>(arguments.params, plan);
    }
  }

 private:
  using Position = RingPosition<kStages>;

  const Arguments& arguments_;
  const Params& p_;
  char* const memory_;
  const uint32_t shared_;

  /// The plan waits in shared memory: registers are scarcer.
  __device__ Backward(const Arguments& arguments, const Plan& plan)
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
  __device__ uint32_t out_full(int group) const { return full(kStages + 2 + group); }
  __device__ uint32_t out_empty(int group) const { return empty(kStages + 2 + group); }
  __device__ uint32_t stage_at(int stage) const { return shared_ + kRing + stage * kStageBytes; }
  __device__ uint32_t out_at(int group) const { return shared_ + kOut + group * kOutBox; }
  __device__ uint32_t h_at(int buffer) const { return shared_ + kH + buffer * kHBytes; }

  __device__ void run_block(bool is_left_out, bool is_plain) const {
    if (is_left_out) {
      if (threadIdx.x == 0) await_first_copies();
      return;
    }
    if (threadIdx.x == 0) reinterpret_cast<Plan*>(memory_ + kPlan)->is_plain = is_plain;
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (group == 0) {
      give_registers<Registers<kGroups>::kProducer>();
      const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
      if (warp == 0 && elect_one()) produce();
      if (warp > 0 && warp <= kGroups && elect_one()) send(warp - 1);
    } else {
      take_registers<Registers<kGroups>::kConsumer>();
      Consumer(*this, group - 1).run();
    }
  }

  // --- the producer: one thread
  // ---------------------------------------------------------------------------------------

  __device__ static void load(uint32_t shared, const BackwardSource& from, uint32_t barrier, int chunk, int token) {
    tma_load_4d(shared, from.map, barrier, chunk * kChunkDims, token, from.head, from.batch);
  }

  __device__ int token_of_tile(int i) const { return (plan().last_tile - i) * kTileTokens; }

  /// The block's first steps, by one thread: barriers, owners, and vectors of the first tile.
  __device__ void begin() const {
    constexpr int kWarps = kConsumerThreads / 32;
    const BackwardSources from = Form::sources_of(arguments_, plan().head);
    prefetch_tensor_map(from.own_student.map);
    prefetch_tensor_map(from.own_teacher.map);
    prefetch_tensor_map(from.other_student.map);
    prefetch_tensor_map(from.other_teacher.map);
    if constexpr (Form::kOtherValues) prefetch_tensor_map(&arguments_.token_values);
    prefetch_tensor_map(&arguments_.gradient);
    mbarrier_init(owners_loaded(), 1);
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), kWarps);
    }
    for (int b = 0; b < 2; ++b) {
      mbarrier_init(h_full(b), kWarps);
      mbarrier_init(h_empty(b), kShareTile ? kWarps : kWarps / kGroups);
    }
    for (int g = 0; g < kGroups; ++g) {
      mbarrier_init(out_full(g), kWarps / kGroups);
      mbarrier_init(out_empty(g), 1);
    }
    fence_mbarrier_init();
    mbarrier_arrive_expect(owners_loaded(), 2 * kChunks * kOwnerChunk);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int token = 0; token < kOwners; token += kTileTokens) {
        const uint32_t to = shared_ + chunk * kOwnerChunk + token * kLineBytes;
        const int teacher_at = chunk < kRegisterChunks ? kOut : kTeacherRest - kRegisterBytes;
        load(to + teacher_at, from.own_teacher, owners_loaded(), chunk, plan().first + token);
        load(to, from.own_student, owners_loaded(), chunk, plan().first + token);
      }
    }
    load_vectors(from, 0, token_of_tile(0));
  }

  /// The copies that have begun end while their memory is the block's.
  __device__ void await_first_copies() const {
    mbarrier_wait(owners_loaded(), 0);
    load_values(0, token_of_tile(0));
    mbarrier_wait(full(0), 0);
  }

  __device__ void produce() const {
    const BackwardSources from = Form::sources_of(arguments_, plan().head);
    load_values(0, token_of_tile(0));
    Position position;
    position.advance();
    for (int i = 1; i < plan().tiles; ++i, position.advance()) {
      mbarrier_wait(empty(position.stage), position.parity ^ 1);
      load_vectors(from, position.stage, token_of_tile(i));
      load_values(position.stage, token_of_tile(i));
    }
  }

  /// Of a tile that the stage is empty for; its values have to follow.
  __device__ void load_vectors(const BackwardSources& from, int stage, int token) const {
    mbarrier_arrive_expect(full(stage), kStageBytes);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint32_t to = stage_at(stage) + chunk * kOtherChunk;
      load(to, from.other_student, full(stage), chunk, token);
      load(to + kStageTeacher, from.other_teacher, full(stage), chunk, token);
    }
  }
  __device__ void load_values(int stage, int token) const {
    if constexpr (Form::kOtherValues) {
      tma_load_4d(stage_at(stage) + kStageValues, &arguments_.token_values, full(stage), 0, token, plan().head, 0);
    }
  }

  // --- the senders: one thread for each group of consumers
  // ----------------------------------------------------------------

  /// Whether a group adds up the others' gradient of tile i, and how many of the first tiles.
  __device__ static bool is_of_group(int i, int group) { return kShareTile || i % kGroups == group; }
  __device__ static int count_of_group(int tiles, int group) {
    return kShareTile ? tiles : (tiles + kGroups - 1 - group) / kGroups;
  }

  /// The group's sums in the order in which it writes them: of each tile's others, then, where they are added, of the
  /// owners.
  __device__ void send(int group) const {
    int count = 0;
    for (int i = 0; i < plan().tiles; ++i) {
      if (is_of_group(i, group)) send(group, count++, token_of_tile(i), kShareTile ? group : 0);
    }
    if constexpr (Form::kAddsOwners) {
      for (int chunk = 0; chunk < kChunks; ++chunk)
        send(group, count++, plan().first + group * kTileTokens, chunk);
    }
  }

  /// @param count sent before, @param first_token of 64, @param chunk of dimensions
  __device__ void send(int group, int count, int first_token, int chunk) const {
    const int head = Form::head_of_sums(p_, plan().head);
    mbarrier_wait(out_full(group), count % 2);
    tma_reduce_add_4d(&arguments_.gradient, out_at(group), 0, chunk * kOutLines, first_token, head);
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(out_empty(group));
  }

  class Consumer;
};

}  // namespace linearard::cuda::sm90

#include "backward_consumer.cuh"

namespace linearard::cuda::sm90 {

template <typename T, int kDim, typename Form>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ typename Form::Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  Backward<T, kDim, Form>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
