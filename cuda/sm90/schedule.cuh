#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "instructions.cuh"

// Which block of threads does what.

namespace linearard::cuda::sm90 {

/// One warpgroup copies, two or three compute.
inline constexpr int kWarpgroup = 128;
inline constexpr int kGroups = 2;
inline constexpr int kConsumerThreads = kGroups * kWarpgroup;
inline constexpr int kThreads = kWarpgroup + kConsumerThreads;

/// Registers of a thread of the warpgroup that copies and of those that compute.
template <int kGroups>
struct Registers {
  static_assert(kGroups == 2 || kGroups == 3);
  static constexpr int kProducer = kGroups == 2 ? 24 : 32;
  static constexpr int kConsumer = kGroups == 2 ? 240 : 160;
};

/// Tokens of a walk's tile, and of one load of the copy engine.
inline constexpr int kTileTokens = 64;

/// A block of threads owns a block of tokens of one head and walks over other tokens in tiles. Walks have different
/// lengths; the hardware hands out blocks of threads in order, so the long ones come first. Heads are taken in groups
/// whose vectors stay in the L2 cache. Where there are fewer walks than multiprocessors, each is cut into parts.
struct Schedule {
  int heads;
  int heads_of_group;
  int token_blocks;
  int parts;

  int64_t blocks() const { return static_cast<int64_t>(heads) * token_blocks * parts; }

  /// @param longest tiles of the longest walk, @param head_bytes of one head's vectors
  static Schedule make(int heads, int token_blocks, int longest, int64_t head_bytes, int multiprocessors) {
    constexpr int64_t kCacheBytes = int64_t{24} << 20;
    constexpr int kShortestPart = 4;
    const int64_t walks = static_cast<int64_t>(heads) * token_blocks;
    const int wanted = static_cast<int>(std::min<int64_t>(2 * multiprocessors / std::max<int64_t>(walks, 1), INT_MAX));
    return {heads, static_cast<int>(std::clamp<int64_t>(kCacheBytes / std::max<int64_t>(head_bytes, 1), 1, heads)),
            token_blocks, std::clamp(wanted, 1, std::max(longest / kShortestPart, 1))};
  }
};

/// A block's place in the schedule.
struct Walk {
  int head;         ///< of [B H]
  int token_block;  ///< 0 has the longest walk
  int part;

  __device__ static Walk of_block(const Schedule& schedule, int block) {
    const int head_blocks = schedule.token_blocks * schedule.parts;
    const int64_t group_blocks = static_cast<int64_t>(head_blocks) * schedule.heads_of_group;
    const int first = static_cast<int>(block / group_blocks) * schedule.heads_of_group;
    const int heads = min(schedule.heads_of_group, schedule.heads - first);
    const int index = static_cast<int>(block % group_blocks);
    return {first + index % heads, index / heads / schedule.parts, index / heads % schedule.parts};
  }

  /// Where part `part` of `tiles` begins.
  __device__ static int part_begin(const Schedule& schedule, int part, int tiles) {
    return static_cast<int>(static_cast<int64_t>(tiles) * part / schedule.parts);
  }
};

// Named barriers: the turn of either warpgroup that computes, and both of them. A turn is taken by the whole group,
// with constants as names: a name in a register is one register more.
inline constexpr int kTurnOfFirst = 1;
inline constexpr int kTurnOfSecond = 2;
inline constexpr int kAllConsumers = 3;

/// The tensor cores are used in turns, so that one warpgroup multiplies while the other one computes with the results.
__device__ inline void wait_for_turn(int group) {
  if (group == 0) {
    barrier_sync(kTurnOfFirst, kConsumerThreads);
  } else {
    barrier_sync(kTurnOfSecond, kConsumerThreads);
  }
}
/// Once more by the second group before everything: the first turn is the first group's.
__device__ inline void pass_turn(int group) {
  if (group == 0) {
    barrier_arrive(kTurnOfSecond, kConsumerThreads);
  } else {
    barrier_arrive(kTurnOfFirst, kConsumerThreads);
  }
}

/// Position in a ring of shared-memory buffers.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace linearard::cuda::sm90
