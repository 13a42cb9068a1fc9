#pragma once

#include <type_traits>

#include "../triangular/group.cuh"
#include "../triangular/head.cuh"
#include "descriptors.cuh"
#include "instructions.cuh"
#include "pairs.cuh"
#include "schedule.cuh"

// The sums of the triangular forward. A block of threads owns a block of tokens; all later tokens of the head visit it,
// 64 at a time. Visitors are the rows of the products and owners their columns: sums of owners stay in registers for
// the whole walk, and those of visitors, a few values of four neighbouring threads, leave with each tile. The other way
// round every tile's columns would have to be summed over eight threads, which costs a third of the arithmetic again.

namespace linearard::cuda::sm90 {

struct ForwardArguments {
  CUtensorMap student[kLargestGroup];  ///< of the relations
  CUtensorMap teacher[kLargestGroup];
  TriangularForwardParams params;
  Schedule schedule;
};

/// @tparam kCausal whether a pair counts for its later token only
template <typename T, int kDim, bool kCausal>
class Forward {
 public:
  /// Warpgroups that compute: three of them hide each other's latencies where shared memory holds their owners.
  static constexpr int kGroups = kDim <= 128 ? 3 : 2;
  static constexpr int kGroupOwners = kTileTokens;
  static constexpr int kOwners = kGroups * kGroupOwners;
  static constexpr int kThreads = (1 + kGroups) * kWarpgroup;

 private:
  static constexpr int kElements = kGroupOwners / 2;  ///< accumulators of a thread, of either product
  static constexpr int kChunks = kDim / kChunkDims;
  static constexpr int kOwnerChunk = kOwners * kLineBytes;
  static constexpr int kVisitorChunk = kTileTokens * kLineBytes;
  // A stage holds the visitors' vectors of one side: first the teacher's, then the student's.
  static constexpr int kStages = kDim <= 64 ? 8 : kDim <= 128 ? 6 : 3;
  static constexpr int kStageBytes = kChunks * kVisitorChunk;
  static constexpr int kOwnerTeacher = kChunks * kOwnerChunk;
  static constexpr int kRing = 2 * kOwnerTeacher;
  static constexpr int kOwnerValues = kRing + kStages * kStageBytes;
  static constexpr int kBarriers = kOwnerValues + kOwners * static_cast<int>(sizeof(ForwardToken));

 public:
  static constexpr int kSharedBytes = kBarriers + (2 + 2 * kStages) * 8;
  static_assert(kSharedBytes <= 227 * 1024);

  __device__ static void run(const ForwardArguments& arguments) {
    const Walk walk = Walk::of_block(arguments.schedule, static_cast<int>(blockIdx.x));
    Forward forward(arguments, walk);
    const bool walks = forward.begin_ < forward.end_;
    // Vectors are what no step of the call writes: they are on their way before the steps ahead have ended.
    if (walks && threadIdx.x == 0) forward.begin();
    wait_for_kernels_ahead();
    if (walks) forward.run_block(walk.token_block == 0 && walk.part == 0);
  }

 private:
  using Position = RingPosition<kStages>;

  const ForwardArguments& arguments_;
  const TriangularForwardParams& p_;
  char* const memory_;
  const uint32_t shared_;
  const int head_;
  const int first_;  ///< owner
  int begin_;        ///< tiles of visitors
  int end_;

  __device__ Forward(const ForwardArguments& arguments, const Walk& walk)
      : arguments_(arguments),
        p_(arguments.params),
        memory_(dynamic_shared_memory()),
        shared_(shared_address(memory_)),
        head_(walk.head),
        first_(walk.token_block * kOwners) {
    const int begin = first_ / kTileTokens;
    const int tiles = (p_.tokens + kTileTokens - 1) / kTileTokens - begin;
    begin_ = begin + Walk::part_begin(arguments.schedule, walk.part, tiles);
    end_ = begin + Walk::part_begin(arguments.schedule, walk.part + 1, tiles);
  }

  __device__ uint32_t teacher_loaded() const { return shared_ + kBarriers; }  // the owners'
  __device__ uint32_t student_loaded() const { return teacher_loaded() + 8; }
  __device__ uint32_t full(int stage) const { return student_loaded() + 8 + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return full(stage) + 8; }
  __device__ uint32_t stage_at(int stage) const { return shared_ + kRing + stage * kStageBytes; }
  // Of the head: its first reference and sum are the same for all threads, and so are kept once.
  __device__ const float* references() const { return p_.references + static_cast<int64_t>(head_) * p_.tokens; }
  __device__ float* sums() const { return p_.sums + static_cast<int64_t>(head_) * kSums * p_.tokens; }

  /// @param is_first whether the block tells others about the head
  __device__ void run_block(bool is_first) {
    const int owner = first_ + static_cast<int>(threadIdx.x);
    const bool is_owner = threadIdx.x < kOwners && owner < p_.tokens;
    const float reference = is_owner ? __ldg(references() + static_cast<uint32_t>(owner)) : 0.f;
    const int blocks = triangular::blocks_of_head(p_.tokens);
    const auto head = triangular::ForwardHead::of(p_.largest + static_cast<int64_t>(head_) * blocks, blocks);
    if (is_first && threadIdx.x == 0) {
      p_.centers[head_] = head.center;
      p_.wide_heads[head_] = head.is_wide ? 1 : 0;
      p_.plain_heads[head_] = head.is_plain ? 1 : 0;
    }
    if (threadIdx.x < kOwners) {
      reinterpret_cast<ForwardToken*>(memory_ + kOwnerValues)[threadIdx.x] =
          is_owner ? head.value(reference) : ForwardToken{0.f, 0.f};
    }
    if (head.is_wide) {
      if (threadIdx.x == 0) await_first_copies();
      return;
    }
    __syncthreads();
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    if (group == 0) {
      give_registers<Registers<kGroups>::kProducer>();
      if (threadIdx.x < 32 && elect_one()) produce();
    } else {
      take_registers<Registers<kGroups>::kConsumer>();
      consume(group - 1, head);
    }
  }

  // --- the producer: one thread
  // ---------------------------------------------------------------------------------------

  /// Vectors of the block's head.
  struct Source {
    const CUtensorMap* map;
    int batch;
    int head;
  };

  __device__ static void load(uint32_t shared, const Source& from, uint32_t barrier, int chunk, int token) {
    tma_load_4d(shared, from.map, barrier, chunk * kChunkDims, token, from.head, from.batch);
  }

  __device__ Source source_of(const CUtensorMap (&maps)[kLargestGroup]) const {
    const triangular::Place place = triangular::place_of(p_.group, head_);
    return {&maps[place.relation], place.batch, place.head};
  }

  /// The block's first steps, by one thread: barriers, and what the first product is made of.
  __device__ void begin() const {
    const Source student = source_of(arguments_.student);
    const Source teacher = source_of(arguments_.teacher);
    prefetch_tensor_map(teacher.map);
    prefetch_tensor_map(student.map);
    mbarrier_init(teacher_loaded(), 1);
    mbarrier_init(student_loaded(), 1);
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), kGroups * kWarpgroup / 32);
    }
    fence_mbarrier_init();
    load_owners(shared_ + kOwnerTeacher, teacher, teacher_loaded());
    load_visitors(teacher, 0, begin_);
  }

  /// The copies that have begun end while their memory is the block's.
  __device__ void await_first_copies() const {
    mbarrier_wait(teacher_loaded(), 0);
    mbarrier_wait(full(0), 0);
  }

  __device__ void load_owners(uint32_t shared, const Source& from, uint32_t barrier) const {
    mbarrier_arrive_expect(barrier, kOwnerTeacher);
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      for (int token = 0; token < kOwners; token += kTileTokens)
        load(shared + chunk * kOwnerChunk + token * kLineBytes, from, barrier, chunk, first_ + token);
    }
  }

  __device__ void load_visitors(const Source& from, int stage, int tile) const {
    mbarrier_arrive_expect(full(stage), kStageBytes);
    for (int chunk = 0; chunk < kChunks; ++chunk)
      load(stage_at(stage) + chunk * kVisitorChunk, from, full(stage), chunk, tile * kTileTokens);
  }
  __device__ void load_visitors(const Source& from, Position& position, int tile) const {
    mbarrier_wait(empty(position.stage), position.parity ^ 1);
    load_visitors(from, position.stage, tile);
    position.advance();
  }

  __device__ void produce() const {
    const Source student = source_of(arguments_.student);
    const Source teacher = source_of(arguments_.teacher);
    load_owners(shared_, student, student_loaded());
    Position position;
    position.advance();
    load_visitors(student, position, begin_);
    for (int tile = begin_ + 1; tile < end_; ++tile) {
      load_visitors(teacher, position, tile);
      load_visitors(student, position, tile);
    }
  }

  // --- the consumers: warpgroups
  // ----------------------------------------------------------------------------------

  /// Visitors x owners of the group: issued, not waited for.
  __device__ static void multiply(float (&products)[kElements], uint64_t a, uint64_t b) {
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < kDim / kStep; ++step) {
      wgmma<T, false, false>(products, a + dimension_step<kVisitorChunk>(step), b + dimension_step<kOwnerChunk>(step),
                             step > 0);
    }
    warpgroup_commit();
  }

  __device__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty(stage));
  }

  /// Descriptors of the first stage and of the group's owners, out of the compiler's sight: it would make each step's
  /// from its parts, four instructions where two additions do.
  struct Operands {
    uint64_t ring;
    uint64_t student;
    uint64_t teacher;

    __device__ uint64_t stage(int stage) const { return ring + static_cast<uint64_t>(stage * (kStageBytes / 16)); }
  };

  /// Both products of the tile at `position`, which moves on behind it.
  __device__ void multiply_tile(float (&student)[kElements],
                                float (&teacher)[kElements],
                                Position& position,
                                const Operands& operands) const {
    const int teacher_stage = position.stage;
    mbarrier_wait(full(position.stage), position.parity);
    multiply(teacher, operands.stage(position.stage), operands.teacher);
    position.advance();
    mbarrier_wait(student_loaded(), 0);  // of use to the first tile
    mbarrier_wait(full(position.stage), position.parity);
    multiply(student, operands.stage(position.stage), operands.student);
    warpgroup_wait<1>();
    pin(teacher);
    release(teacher_stage);
    warpgroup_wait<0>();
    pin(student);
    release(position.stage);
    position.advance();
  }

  /// The thread's rows of a tile in global memory. Pointers that move on with the tiles: computed anew for each, their
  /// addresses would be a tenth of the loop.
  struct Visitors {
    const float* references;  ///< of the first row; the other is 8 further
    float* sums;              ///< of the row that the thread adds to; the sums are `stride` apart
    int left;                 ///< tokens of the head from the first row on
    int stride;

    __device__ Visitors(const Forward& of, int first_row)
        : references(of.references() + first_row),
          sums(of.sums() + first_row + added_row()),
          left(of.p_.tokens - first_row),
          stride(of.p_.tokens) {}
    /// The thread keeps the sums of its first row or of the one 8 below.
    __device__ static int added_row() { return 8 * static_cast<int>(threadIdx.x & 1); }
    __device__ ForwardToken value(const triangular::ForwardHead& head, int row) const {
      return row < left ? head.value(__ldg(references + row)) : ForwardToken{0.f, 0.f};
    }
    __device__ void add(const Sums& of_token) const {
      if (added_row() >= left) return;
      atomicAdd(sums, of_token.mass);
      atomicAdd(sums + stride, of_token.moment);
      atomicAdd(sums + 2 * static_cast<int64_t>(stride), of_token.phi);
    }
    __device__ void advance() {
      references += kTileTokens;
      sums += kTileTokens;
      left -= kTileTokens;
    }
  };

  __device__ void consume(int group, const triangular::ForwardHead& head) const {
    const ElementFactors factors(p_.factors);
    const int first_owner = first_ + group * kGroupOwners;
    const uint32_t owners = shared_ + group * kGroupOwners * kLineBytes;
    const auto* columns =
        reinterpret_cast<const ColumnPair*>(memory_ + kOwnerValues) + (group * kGroupOwners + column_of_thread()) / 2;
    const Operands operands{anew(matrix_descriptor<kVisitorChunk>(stage_at(0))),
                            anew(matrix_descriptor<kOwnerChunk>(owners)),
                            anew(matrix_descriptor<kOwnerChunk>(owners + kOwnerTeacher))};
    float student[kElements];
    float teacher[kElements];
    std::conditional_t<kCausal, NoColumnSums, ColumnSums<kElements>> owner_sums;
    Position position;
    Visitors visitors(*this, begin_ * kTileTokens + row_of_thread());
    mbarrier_wait(teacher_loaded(), 0);
#pragma unroll 1
    for (int tile = begin_; tile < end_; ++tile, visitors.advance()) {
      const int first_visitor = tile * kTileTokens;
      const bool all_later = first_visitor >= first_owner + kGroupOwners;
      const bool counts_plainly = head.is_plain && all_later && first_visitor + kTileTokens <= p_.tokens;
      ForwardRows rows{{{0.f, 1.f}, {0.f, 1.f}}, {}};
      if (!counts_plainly) {
        rows.values[0] = visitors.value(head, 0);
        rows.values[1] = visitors.value(head, 8);
      }
      multiply_tile(student, teacher, position, operands);
      if (first_visitor + kTileTokens - 1 <= first_owner) continue;
      const Diagonal diagonal{first_visitor + row_of_thread() - first_owner - column_of_thread()};
      if (all_later) {
        add_pairs<false>(student, teacher, factors, counts_plainly, columns, diagonal, rows, owner_sums);
      } else {
        write_own(student, teacher, factors, diagonal, first_visitor + row_of_thread());
        add_pairs<true>(student, teacher, factors, false, columns, diagonal, rows, owner_sums);
      }
      write_visitors(rows.sums, visitors);
    }
    if constexpr (!kCausal) write_owners(owner_sums.values, first_owner);
  }

  __device__ void write_own(const float (&student)[kElements],
                            const float (&teacher)[kElements],
                            const ElementFactors& factors,
                            const Diagonal& diagonal,
                            int first_row) const {
    OwnLogit* const own = p_.own + static_cast<int64_t>(head_) * p_.tokens;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int row = first_row + i % 4 / 2 * 8;
      if (diagonal.row_minus_column(i / 4, i % 4) != 0 || row >= p_.tokens) continue;
      own[row] = factors.own_logit(student[i], teacher[i]);
    }
  }

  // --- sums leave by additions in global memory
  // -----------------------------------------------------------------------

  __device__ void add(int token, const Sums& of_token) const {
    if (token >= p_.tokens) return;
    const auto index = static_cast<uint32_t>(token);
    atomicAdd(sums() + index, of_token.mass);
    atomicAdd(sums() + p_.tokens + index, of_token.moment);
    atomicAdd(sums() + 2 * static_cast<int64_t>(p_.tokens) + index, of_token.phi);
  }

  /// The thread whose lane differs in this bit keeps the other sums; this one returns its own.
  __device__ static Sums exchange(const Sums& first, const Sums& second, int bit) {
    const bool keeps_second = (threadIdx.x & bit) != 0;
    const auto exchanged = [=](float a, float b) {
      return (keeps_second ? b : a) + __shfl_xor_sync(0xffffffffu, keeps_second ? a : b, bit);
    };
    return {exchanged(first.mass, second.mass), exchanged(first.moment, second.moment),
            exchanged(first.phi, second.phi)};
  }

  /// Over the four threads that share the rows: one keeps the first row, its neighbour the second.
  __device__ static void write_visitors(const Sums (&sums)[2], const Visitors& visitors) {
    Sums mine = exchange(sums[0], sums[1], 1);
    mine.mass += __shfl_xor_sync(0xffffffffu, mine.mass, 2);
    mine.moment += __shfl_xor_sync(0xffffffffu, mine.moment, 2);
    mine.phi += __shfl_xor_sync(0xffffffffu, mine.phi, 2);
    if ((threadIdx.x & 2) == 0) visitors.add(mine);
  }

  /// Over the eight threads that share the columns, each of which keeps one column of two fragments in four.
  __device__ void write_owners(const Sums (&of_thread)[kElements / 2], int first_owner) const {
    constexpr int kFragments = kElements / 4;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < kFragments; n += 4) {
      Sums of_fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        of_fragment[i] = exchange(of_thread[2 * (n + i)], of_thread[2 * (n + i) + 1], 4);
      const Sums even = exchange(of_fragment[0], of_fragment[1], 8);
      const Sums odd = exchange(of_fragment[2], of_fragment[3], 8);
      const int fragment = n + (lane >> 3 & 1) + (lane >> 4) * 2;
      const int token = first_owner + 8 * fragment + column_of_thread() + (lane >> 2 & 1);
      add(token, exchange(even, odd, 16));
    }
  }
};

template <typename T, int kDim, bool kCausal>
__global__ void __launch_bounds__(Forward<T, kDim, kCausal>::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  Forward<T, kDim, kCausal>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
