#pragma once

#include <algorithm>
#include <cmath>
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
/// whose vectors stay in the L2 cache; but the short walks of all heads fill the end, where a group's long ones would
/// leave most multiprocessors idle. Where there are fewer walks than multiprocessors, or the longest one alone would
/// take longer than all do together, each is cut into parts.
struct Schedule {
  int heads;
  int heads_of_group;
  int token_blocks;
  int last_blocks;  ///< of the token blocks, those whose walks come after all others
  int parts;

  int64_t blocks() const { return static_cast<int64_t>(heads) * token_blocks * parts; }

  /// @param longest tiles of the longest walk, @param step that each is shorter than the one before it,
  /// @param head_bytes of one head's vectors
  static Schedule make(int heads, int token_blocks, int longest, int step, int64_t head_bytes, int multiprocessors) {
    constexpr int64_t kCacheBytes = int64_t{24} << 20;
    constexpr int kShortestPart = 4;
    const int64_t walks = static_cast<int64_t>(heads) * token_blocks;
    int64_t wanted = 2 * multiprocessors / std::max<int64_t>(walks, 1);
    // A part more costs the owners' vectors again: an eighth is let pass.
    const int64_t of_head = token_blocks * (2 * int64_t{longest} - int64_t{step} * (token_blocks - 1)) / 2;
    const int64_t share = std::max<int64_t>(of_head * heads / multiprocessors, 1);  // of a multiprocessor, in tiles
    if (longest > share + share / 8) wanted = std::max(wanted, (longest + share - 1) / share);
    const auto group = static_cast<int>(std::clamp<int64_t>(kCacheBytes / std::max<int64_t>(head_bytes, 1), 1, heads));
    Schedule schedule{heads, group, token_blocks, 0,
                      static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max(longest / kShortestPart, 1)))};
    if (step > 0) schedule.order(0, token_blocks, multiprocessors);
    return schedule;
  }

  /// Lets short walks come last.
  /// @param shortest the shortest walk but for the first of its steps, in steps; less than 0: as many are empty,
  /// @param longest in steps
  void order(double shortest, double longest, int multiprocessors) {
    constexpr double kLastWork = 1.6;
    if (heads_of_group >= heads) return;
    // The work at the end grows with the square of their number, where the shortest walks are short: it is about that
    // of the longest walk on each multiprocessor.
    const double least = std::max(shortest, 0.0);
    const double walks = std::sqrt(least * least + kLastWork * multiprocessors * longest / std::max(heads, 1)) - least;
    last_blocks = static_cast<int>(std::min<double>(walks + std::max(-shortest, 0.0), token_blocks));
  }
};

/// A block's place in the schedule.
struct Walk {
  int head;         ///< of [B H]
  int token_block;  ///< 0 has the longest walk
  int part;

  // All blocks of a group are no more than the grid's, so 32 bits hold them; divisions of 64 are calls.
  __device__ static Walk of_block(const Schedule& schedule, int block) {
    const int first_blocks = schedule.token_blocks - schedule.last_blocks;
    const int head_blocks = first_blocks * schedule.parts;
    auto index = static_cast<uint32_t>(block);
    int first = 0;
    int heads = schedule.heads;
    int token_block = 0;
    if (block >= head_blocks * schedule.heads) {
      index -= static_cast<uint32_t>(head_blocks * schedule.heads);
      token_block = first_blocks;
    } else {
      const auto group_blocks = static_cast<uint32_t>(head_blocks * schedule.heads_of_group);
      const uint32_t group = index / group_blocks;
      index -= group * group_blocks;
      first = static_cast<int>(group) * schedule.heads_of_group;
      heads = min(schedule.heads_of_group, schedule.heads - first);
    }
    const uint32_t walk = index / static_cast<uint32_t>(heads);
    const int head = first + static_cast<int>(index - walk * static_cast<uint32_t>(heads));
    if (schedule.parts == 1) return {head, token_block + static_cast<int>(walk), 0};
    const auto parts = static_cast<uint32_t>(schedule.parts);
    return {head, token_block + static_cast<int>(walk / parts), static_cast<int>(walk % parts)};
  }

  /// Where part `part` of `tiles` begins.
  __device__ static int part_begin(const Schedule& schedule, int part, int tiles) {
    if (schedule.parts == 1) return part * tiles;
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
