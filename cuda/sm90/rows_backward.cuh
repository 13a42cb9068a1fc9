#pragma once

#include "descriptors.cuh"
#include "instructions.cuh"
#include "operands.cuh"
#include "rows.h"
#include "rows_gradient.cuh"
#include "rows_pairs.cuh"
#include "schedule.cuh"

// The row-wise backward: H X, or G K, or G^T Q, for 128 owners of a block, 64 for each warpgroup. Their gradient stays
// in registers for the whole walk over the others, 64 at a time, and is written once.

namespace linearard::cuda::sm90 {

struct RowsBackwardArguments {
  CUtensorMap own_student;
  CUtensorMap own_teacher;
  CUtensorMap other_student;
  CUtensorMap other_teacher;
  CUtensorMap other_values;
  RowsBackwardParams params;
  Schedule schedule;
};

template <typename T, int kDim, Pairs kPairs>
class RowsBackward {
 public:
  static constexpr int kOwners = kGroups * kTileTokens;

 private:
  using Terms = RowTerms<kPairs>;
  using Value = typename Terms::Value;
  static constexpr int kElements = kTileTokens / 2;  ///< accumulators of a thread, of either product of vectors
  static constexpr int kChunks = kDim / kChunkDims;
  static constexpr int kOwnerChunk = kOwners * kLineBytes;
  static constexpr int kOtherChunk = kTileTokens * kLineBytes;
  /// Whether the pair of a token with itself is minus the sum of its row's others.
  static constexpr bool kSumsRows = kPairs == Pairs::kRelation;
  /// The gradient's accumulators: one product makes 128 dimensions of it.
  static constexpr int kParts = kDim <= 128 ? 1 : kDim / 128;
  static constexpr int kPartElements = kDim / kParts / 2;
  /// Whether the teacher's next product is made while this tile's H is computed: where registers hold it.
  static constexpr bool kAhead = kDim <= 128;
  // A stage holds the others' vectors of one side: first the teacher's, then the student's. Values come with the
  // latter; those of a tile have been read when the student's next but kValueStages is loaded.
  static constexpr int kStages = kDim <= 128 ? 8 : 3;
  static constexpr int kStageBytes = kChunks * kOtherChunk;
  static constexpr bool kOtherValues = kPairs != Pairs::kQueries;
  static constexpr int kValueStages = (kStages + 1) / 2;
  static constexpr int kValueBytes = kOtherValues ? kTileTokens * static_cast<int>(sizeof(Value)) : 0;
  static constexpr int kOwnerTeacher = kChunks * kOwnerChunk;
  static constexpr int kRing = 2 * kOwnerTeacher;
  static constexpr int kValues = kRing + kStages * kStageBytes;
  /// The owners' values lie in shared memory where there is room, else in the cache: they are read again for each tile.
  static constexpr bool kSharedOwn = Terms::kReadsRows && kDim <= 128;
  static constexpr int kOwnValues = kValues + kValueStages * kValueBytes;
  static constexpr int kBarriers = kOwnValues + (kSharedOwn ? kOwners * static_cast<int>(sizeof(Value)) : 0);

 public:
  static constexpr int kSharedBytes = kBarriers + (1 + 2 * kStages) * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static void run(const RowsBackwardArguments& arguments) {
    const Walk walk = Walk::of_block(arguments.schedule, static_cast<int>(blockIdx.x));
    const RowsBackwardParams& p = arguments.params;
    wait_for_kernels_ahead();
    if (p.wide_heads != nullptr && p.wide_heads[walk.head] != 0) return;
    RowsBackward(arguments, walk).run_block();
  }

 private:
  using Position = RingPosition<kStages>;

  const RowsBackwardArguments& arguments_;
  const RowsBackwardParams& p_;
  char* const memory_;
  const uint32_t shared_;
  const int problem_;  ///< head of [B heads]
  const int first_;    ///< owner
  int begin_;          ///< tile of others, and how many: of each head
  int head_tiles_;
  int tiles_;  ///< of all heads

  __device__ RowsBackward(const RowsBackwardArguments& arguments, const Walk& walk)
      : arguments_(arguments),
        p_(arguments.params),
        memory_(dynamic_shared_memory()),
        shared_(shared_address(memory_)),
        problem_(walk.head),
        first_(Terms::first_of(walk.token_block, arguments.schedule.token_blocks) * kOwners) {
    int begin = 0;
    int end = p_.others;
    if (p_.causal && kPairs == Pairs::kQueries) end = max(0, min(end, first_ + kOwners + p_.offset));
    if (p_.causal && kPairs == Pairs::kKeys) begin = min(end, max(0, first_ - p_.offset));
    begin_ = begin / kTileTokens;
    head_tiles_ = begin < end ? (end + kTileTokens - 1) / kTileTokens - begin_ : 0;
    // Two at a time; one that does not exist is zeros.
    if (kAhead) head_tiles_ += head_tiles_ % 2;
    tiles_ = head_tiles_ * p_.other_heads;
  }

  __device__ uint32_t owners_loaded() const { return shared_ + kBarriers; }
  __device__ uint32_t full(int stage) const { return shared_ + kBarriers + 8 + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ uint32_t stage_at(int stage) const { return shared_ + kRing + stage * kStageBytes; }

  __device__ Value own_value(int row) const {
    const int token = first_ + row;
    if (token >= p_.owners) return {0, 0, 0, 0};
    const auto* values = static_cast<const float4*>(p_.own_values) + static_cast<int64_t>(problem_) * p_.owners;
    const float4 value = __ldg(values + token);
    return {value.x, value.y, value.z, value.w};
  }
  __device__ Value* own_values() const { return reinterpret_cast<Value*>(memory_ + kOwnValues); }

  __device__ void run_block() {
    if constexpr (kSharedOwn) {
      if (threadIdx.x < kOwners) own_values()[threadIdx.x] = own_value(static_cast<int>(threadIdx.x));
    }
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
      if (threadIdx.x < 32 && elect_one() && tiles_ > 0) produce();
    } else {
      take_registers<Registers<kGroups>::kConsumer>();
      consume(group - 1);
    }
  }

  // --- the producer: one thread
  // ---------------------------------------------------------------------------------------

  __device__ static void load(
      uint32_t shared, const CUtensorMap& map, uint32_t barrier, int chunk, int token, int head, int batch) {
    tma_load_4d(shared, &map, barrier, chunk * kChunkDims, token, head, batch);
  }

  __device__ void produce() const {
    prefetch_tensor_map(&arguments_.own_student);
    prefetch_tensor_map(&arguments_.own_teacher);
    prefetch_tensor_map(&arguments_.other_student);
    prefetch_tensor_map(&arguments_.other_teacher);
    const int batch = problem_ / p_.heads;
    const int head = problem_ % p_.heads;
    mbarrier_arrive_expect(owners_loaded(), 2 * kOwnerTeacher);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int token = 0; token < kOwners; token += kTileTokens) {
        const uint32_t to = shared_ + chunk * kOwnerChunk + token * kLineBytes;
        load(to + kOwnerTeacher, arguments_.own_teacher, owners_loaded(), chunk, first_ + token, head, batch);
        load(to, arguments_.own_student, owners_loaded(), chunk, first_ + token, head, batch);
      }
    }
    const int first_head = head * p_.other_heads / p_.group;
    const int value_head = problem_ * p_.other_heads / p_.group;
    Position position;
    int i = 0;
    for (int other = 0; other < p_.other_heads; ++other) {
      for (int tile = 0; tile < head_tiles_; ++tile, ++i) {
        const int token = (begin_ + tile) * kTileTokens;
        load_others(arguments_.other_teacher, position, token, first_head + other, batch, 0);
        position.advance();
        load_others(arguments_.other_student, position, token, first_head + other, batch, kValueBytes);
        if constexpr (kOtherValues) {
          tma_load_4d(shared_ + kValues + i % kValueStages * kValueBytes, &arguments_.other_values,
                      full(position.stage), 0, token, value_head + other, 0);
        }
        position.advance();
      }
    }
  }

  __device__ void load_others(
      const CUtensorMap& map, const Position& position, int token, int head, int batch, int more_bytes) const {
    const int s = position.stage;
    mbarrier_wait(empty(s), position.parity ^ 1);
    mbarrier_arrive_expect(full(s), kStageBytes + more_bytes);
    for (int chunk = 0; chunk < kChunks; ++chunk)
      load(stage_at(s) + chunk * kOtherChunk, map, full(s), chunk, token, head, batch);
  }

  // --- the consumers: two warpgroups
  // ----------------------------------------------------------------------------------

  struct Consumer {
    const RowsBackward& b;
    const int group;
    Position position;      ///< of the next product of vectors
    int student_stage = 0;  ///< of the tile whose H comes next, or came last
    float student[kElements];
    float gradient[kParts][kPartElements];
    uint32_t h[kElements / 8][4];
    float row_sums[2] = {0, 0};  ///< relation: of G over the rows' other tokens

    __device__ Consumer(const RowsBackward& block, int number) : b(block), group(number) {}

    /// Owners x others: issued, not waited for.
    __device__ void multiply(float (&products)[kElements], int own, int stage) {
      const uint32_t own_at = b.shared_ + own + group * kTileTokens * kLineBytes;
      const Operand<kOwnerChunk> rows(own_at);
      const Operand<kOtherChunk> columns(b.stage_at(stage));
      const uint64_t rows_kept = matrix_descriptor<kOwnerChunk>(own_at);
      const uint64_t columns_kept = matrix_descriptor<kOtherChunk>(b.stage_at(stage));
      warpgroup_fence();
#pragma unroll
      for (int step = 0; step < kDim / kStep; ++step) {
        // Steps made anew take fewer registers where the next products are made ahead, and more elsewhere.
        wgmma<T, false, false>(
            products,
            kAhead ? rows.at(dimension_step<kOwnerChunk>(step)) : rows_kept + dimension_step<kOwnerChunk>(step),
            kAhead ? columns.at(dimension_step<kOtherChunk>(step)) : columns_kept + dimension_step<kOtherChunk>(step),
            step > 0);
      }
      warpgroup_commit();
    }

    /// gradient += H x the others' student vectors.
    __device__ void add_product(int stage) {
      const uint64_t x = matrix_descriptor<kOtherChunk>(b.stage_at(stage));
      warpgroup_fence();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int step = 0; step < kTileTokens / kStep; ++step) {
          wgmma<T, true>(gradient[part], h[step],
                         x + static_cast<uint64_t>(part * (kChunks / kParts) * kOtherChunk / 16) + token_step(step),
                         true);
        }
      }
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
    __device__ void visit_ahead(float (&teacher)[kElements], float (&next)[kElements], int i) {
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

    /// Products of tile i, then its H and its product.
    __device__ void visit(float (&teacher)[kElements], int i) {
      const int teacher_stage = next_stage();
      multiply(teacher, kOwnerTeacher, teacher_stage);
      student_stage = next_stage();
      multiply(student, 0, student_stage);
      warpgroup_wait<0>();
      pin(teacher);
      pin(student);
      release(teacher_stage);
      weigh(teacher, i);
      add_product(student_stage);
      warpgroup_wait<0>();
      release(student_stage);
    }

    __device__ void weigh(float (&teacher)[kElements], int i) {
      const int row = group * kTileTokens + row_of_thread();
      const int first_row = b.first_ + group * kTileTokens;
      const int first_column = (b.begin_ + (kPairs == Pairs::kKeys ? i % b.head_tiles_ : i)) * kTileTokens;
      const int value_stage = kStages % 2 == 0 ? student_stage / 2 : i % kValueStages;
      const auto* columns =
          reinterpret_cast<const Value*>(b.memory_ + kValues + value_stage * kValueBytes) + column_of_thread();
      Value own[2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kSharedOwn) {
          own[r] = b.own_values()[row + 8 * r];
        } else if constexpr (Terms::kReadsRows) {
          own[r] = b.own_value(row + 8 * r);
        }
      }
      if (kSumsRows && first_column == first_row) leave_out_own(teacher);
      Terms terms(b.p_, own, b.first_ + row);
      if (terms.enter(b.p_, first_row, first_column)) {
        weigh_row_pairs<T, true>(student, teacher, terms, columns, first_column + column_of_thread(), h, row_sums);
      } else {
        weigh_row_pairs<T, false>(student, teacher, terms, columns, 0, h, row_sums);
      }
    }

    /// In the tile on the diagonal, pairs of a token with itself get logits whose E is 0 and whose difference is 0.
    __device__ void leave_out_own(float (&teacher)[kElements]) {
      const int thread = anew(static_cast<int>(threadIdx.x)) % kWarpgroup;  // registers are scarce
      const int distance = thread / 32 * 16 + thread % 32 / 4 - thread % 4 * 2;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (distance + e % 4 / 2 * 8 == e / 4 * 8 + e % 2) student[e] = teacher[e] = -1e30f;
      }
    }

    template <int kCount>
    __device__ static void clear(float (&registers)[kCount]) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        registers[i] = 0;
      pin(registers);
    }

    __device__ void run() {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        clear(gradient[part]);
      if (b.tiles_ > 0) {
        mbarrier_wait(b.owners_loaded(), 0);
        float even[kElements];
        if constexpr (kAhead) {
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
            visit_ahead(even, odd, i);
            visit_ahead(odd, even, i + 1);
          }
        } else {
#pragma unroll 1
          for (int i = 0; i < b.tiles_; ++i)
            visit(even, i);
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          pin(gradient[part]);
      }
    }
  };

  __device__ void consume(int group) const {
    Consumer consumer(*this, group);
    consumer.run();
    let_next_kernel_begin();
    // Found again: registers are scarce in the walk.
    const Walk walk = Walk::of_block(arguments_.schedule, anew(static_cast<int>(blockIdx.x)));
    const int first = Terms::first_of(walk.token_block, arguments_.schedule.token_blocks) * kOwners;
    const int row = anew(static_cast<int>(threadIdx.x)) / kWarpgroup * kTileTokens - kTileTokens + row_of_thread();
    if constexpr (kSumsRows) add_own(consumer.gradient, consumer.row_sums, row);
    write_gradient<T, kDim>(p_, consumer.gradient[0], walk.head, first + row);
  }

  /// A token's pair with itself: G_ii is minus the sum of the row's others, which keeps digits where P_ii is close to
  /// 1, and counts twice, as a row and as a key.
  /// @param row of the block, the thread's first one
  __device__ void add_own(float (&gradient)[kParts][kPartElements], const float (&row_sums)[2], int row) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = over_columns(row_sums[r]);
#pragma unroll
      for (int piece = 0; piece < kDim / 8; ++piece) {
        constexpr int kPieces = kChunkDims / 8;
        const uint32_t line = swizzled(piece / kPieces * kOwnerChunk, row + 8 * r, piece % kPieces);
        const T* x = reinterpret_cast<const T*>(memory_ + line) + column_of_thread();
        constexpr int kPartPieces = kPartElements / 4;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& of_pair = gradient[piece / kPartPieces][piece % kPartPieces * 4 + 2 * r + c];
          of_pair = fmaf(-2.f * sum, static_cast<float>(x[c]), of_pair);
        }
      }
    }
  }
};

template <typename T, int kDim, Pairs kPairs>
__global__ void __launch_bounds__(kThreads, 1)
    rows_backward_kernel(const __grid_constant__ RowsBackwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  RowsBackward<T, kDim, kPairs>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
