#pragma once

#include "../triangular/params.h"
#include "descriptors.cuh"
#include "instructions.cuh"
#include "operands.cuh"
#include "pairs.cuh"
#include "schedule.cuh"

// The sums of the triangular forward, row by row: 128 owners of a block, 64 for each warpgroup, are the rows of the
// products, and all other tokens visit them, 64 at a time. What a pair weighs in its row depends on no other value of
// its column: E_ij weight_j = 2^(t_ij - bias_i + kHeadroom / 2 - center).

namespace linearard::cuda::sm90 {

struct RowsForwardArguments {
  CUtensorMap student;
  CUtensorMap teacher;
  TriangularForwardParams params;
  Schedule schedule;
};

/// Sums of a thread's two rows.
struct RowPairSums {
  float mass[2] = {0, 0};
  float moment[2] = {0, 0};
  float phi[2] = {0, 0};

  __device__ void add(const RowPairSums& other) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      mass[r] += other.mass[r];
      moment[r] += other.moment[r];
      phi[r] += other.phi[r];
    }
  }
};

/// Which pairs of a tile count.
struct RowWindow {
  int row;      ///< the thread's first one
  int column;   ///< likewise
  int end;      ///< of the columns
  bool causal;  ///< earlier columns only, else all but the row itself

  __device__ bool counts(int fragment, int c) const {
    const int j = column + 8 * fragment + c % 2;
    const int i = row + c / 2 * 8;
    return j < end && (causal ? j < i : j != i);
  }
};

template <bool kPartial, bool kAllNear, int kElements>
__device__ void add_row_fragments(const float (&difference)[kElements],
                                  const float (&teacher)[kElements],
                                  int first,
                                  const ElementFactors& f,
                                  const float (&shift)[2],
                                  const RowWindow& window,
                                  RowPairSums& sums) {
#pragma unroll
  for (int n = first; n < first + kVoteFragments; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int r = c / 2;
      const float d = difference[4 * n + c];
      const float exponent = fmaf(teacher[4 * n + c], f.teacher, shift[r]);
      float e = exp2_approximate(exponent);
      const float phi = d * d * fmaf(d, fmaf(d, fmaf(d, f.k5, f.k4), f.k3), f.k2);
      if constexpr (kAllNear) {
        sums.mass[r] += e;
        sums.moment[r] = fmaf(e, d, sums.moment[r]);
        sums.phi[r] = fmaf(e, phi, sums.phi[r]);
      } else {
        const float other = f.of_student(d, exponent);
        float moment = e * d;
        float term = fabsf(d) < f.near ? e * phi : fmaf(-f.nats, moment, other - e);
        if (kPartial && !window.counts(n, c)) e = moment = term = 0;
        sums.mass[r] += e;
        sums.moment[r] += moment;
        sums.phi[r] += term;
      }
    }
  }
}

/// Adds all pairs of a tile to the sums of their rows. Overwrites the student's products.
template <bool kPartial, int kElements>
__device__ void add_row_pairs(float (&student)[kElements],
                              const float (&teacher)[kElements],
                              const ElementFactors& factors,
                              const float (&shift)[2],
                              const RowWindow& window,
                              RowPairSums& sums) {
  static_assert(kElements % (4 * kVoteFragments) == 0);
  RowPairSums of_tile;
#pragma unroll
  for (int first = 0; first < kElements / 4; first += kVoteFragments) {
    const float farthest = subtract_teacher(student, teacher, first);
    if (!kPartial && __all_sync(0xffffffffu, farthest < factors.near)) {
      add_row_fragments<false, true>(student, teacher, first, factors, shift, window, of_tile);
    } else {
      add_row_fragments<kPartial, false>(student, teacher, first, factors, shift, window, of_tile);
    }
  }
  sums.add(of_tile);
}

template <typename T, int kDim>
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
  static constexpr int kRegisterSteps = kDim <= 128 ? std::min(kSteps, 6) : 0;
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
    if (arguments.params.wide_heads[walk.head] != 0) return;
    RowsForward(arguments, walk).run_block();
  }

 private:
  using Position = RingPosition<kStages>;

  const RowsForwardArguments& arguments_;
  const TriangularForwardParams& p_;
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
    const int end = p_.causal ? min(first_ + kOwners, p_.tokens) : p_.tokens;
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

  __device__ void load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int chunk, int token) const {
    tma_load_4d(shared, &map, barrier, chunk * kChunkDims, token, head_ % p_.heads, head_ / p_.heads);
  }

  __device__ void load_visitors(const CUtensorMap& map, Position& position, int tile) const {
    const int s = position.stage;
    mbarrier_wait(empty(s), position.parity ^ 1);
    mbarrier_arrive_expect(full(s), kStageBytes);
    for (int chunk = 0; chunk < kChunks; ++chunk)
      load(stage_at(s) + chunk * kVisitorChunk, map, full(s), chunk, tile * kTileTokens);
    position.advance();
  }

  __device__ void produce() const {
    prefetch_tensor_map(&arguments_.student);
    prefetch_tensor_map(&arguments_.teacher);
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
      load_visitors(arguments_.teacher, position, tile);
      load_visitors(arguments_.student, position, tile);
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
      const int first_row = b_.first_ + group_ * kTileTokens + row_of_thread();
      const float center = __ldg(b_.p_.centers + b_.head_);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = first_row + 8 * r;
        const float bias =
            row < b_.p_.tokens ? b_.p_.token_values[static_cast<int64_t>(b_.head_) * b_.p_.tokens + row].bias : 0.f;
        shift_[r] = kHeadroom / 2 - center - bias;
      }
      Products even;
      Products odd;
      // Before the first product: written between products, accumulators would make them wait for each other.
      even.clear();
      odd.clear();
      multiply(even, true);
      done(even, true);
#pragma unroll 1
      for (int tile = 0; tile < b_.tiles_; tile += 2) {
        visit(even, odd, tile);
        visit(odd, even, tile + 1);
      }
      write(first_row);
    }

   private:
    static constexpr int kStepsOfChunk = kChunkDims / kStep;

    const RowsForward& b_;
    const int group_;
    const ElementFactors factors_;
    uint32_t owners_[kRegisterSteps > 0 ? kRegisterSteps : 1][4];  ///< the teacher's vectors of the group's owners
    float shift_[2];
    RowPairSums sums_;
    Position position_;  ///< of the next tile's teacher, whose products come next
    int stages_[2];      ///< of the products under way

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
      add(products, tile);
      done(next, exists);
    }

    __device__ void add(Products& products, int tile) {
      const int first_row = b_.first_ + group_ * kTileTokens;
      const int column = tile * kTileTokens;
      if (column >= b_.p_.tokens || (b_.p_.causal && column > first_row)) return;
      if (column == first_row || column + kTileTokens > b_.p_.tokens) {
        const RowWindow window{first_row + row_of_thread(), column + column_of_thread(), b_.p_.tokens, b_.p_.causal};
        if (column == first_row) write_own(products, window);
        add_row_pairs<true>(products.student, products.teacher, factors_, shift_, window, sums_);
      } else {
        add_row_pairs<false>(products.student, products.teacher, factors_, shift_, RowWindow{}, sums_);
      }
    }

    __device__ void write_own(const Products& products, const RowWindow& window) const {
      OwnLogit* const own = b_.p_.own + static_cast<int64_t>(b_.head_) * b_.p_.tokens;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = window.row + i % 4 / 2 * 8;
        if (window.column + i / 4 * 8 + i % 2 != row || row >= b_.p_.tokens) continue;
        own[row] = factors_.own_logit(products.student[i], products.teacher[i]);
      }
    }

    __device__ static float over_columns(float sum) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
    }

    __device__ void write(int first_row) const {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float mass = over_columns(sums_.mass[r]);
        const float moment = over_columns(sums_.moment[r]);
        const float phi = over_columns(sums_.phi[r]);
        const int row = first_row + 8 * r;
        if (lane() % 4 != 0 || row >= b_.p_.tokens) continue;
        float* to = b_.p_.sums + static_cast<int64_t>(b_.head_) * kSums * b_.p_.tokens + row;
        to[0] = mass;
        to[b_.p_.tokens] = moment;
        to[2 * static_cast<int64_t>(b_.p_.tokens)] = phi;
      }
    }
  };
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    rows_forward_kernel(const __grid_constant__ RowsForwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(LINEARARD_EMULATION)
  RowsForward<T, kDim>::run(arguments);
#endif
}

}  // namespace linearard::cuda::sm90
