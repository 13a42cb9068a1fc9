#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

#include <vector_types.h>

// One block of CUDA threads on one thread of the CPU. Every CUDA thread is a fiber that runs until it has to wait for
// others: at a barrier, a shuffle, a matrix instruction. It follows that races are not found as such; what is found is
// wrong indexing, wrong layouts, data read before it was waited for, and protocols that deadlock. Nothing here says
// anything about speed.

namespace linearard::emulation {

using Location = std::source_location;

/// Last parameter of whatever a kernel calls: the place of the call, for messages.
#define LINEARARD_CALLER ::linearard::emulation::Location at = ::linearard::emulation::Location::current()

/// What a kernel did that a GPU would answer with an error, a hang or an undefined result. Thrown by run_grid.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The grid's kernel as a function of no arguments; blocks run one after the other, none may wait for another.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

/// Which warp goes on where several can: 0 in turn, any other seed at random. A missing barrier shows under some seed.
void set_schedule(uint32_t seed);

inline constexpr int kWarpSize = 32;
inline constexpr int kWarpgroupSize = 128;

// --- for the emulated instructions -----------------------------------------------------------------------------------

/// Number of the running thread within its block.
int this_thread();
int thread_count();
inline int this_lane() { return this_thread() % kWarpSize; }
inline int this_warp() { return this_thread() / kWarpSize; }

/// Ends the grid with an error of the running thread.
[[noreturn]] void fail(const std::string& message, const Location& at);

/// The running thread waits until somebody wakes it. @param what an instruction's name, for messages
void wait(const char* what, const Location& at);
void wake(int thread);

/// Work of the asynchronous units (the copy engine): done when no thread can go on, that is as late as possible.
void defer(std::function<void()> work);

/// What the parts of the emulation do when a block begins and when the kernel of the running thread returns, and what
/// they say of a deadlock.
struct Hooks {
  std::function<void(size_t shared_bytes)> block_begins;
  std::function<void()> thread_ends;
  std::function<std::string()> explain_deadlock;
};
void add_hooks(Hooks hooks);

/// Threads first .. first + size - 1 meet, those whose bit in `mask` is set. Returns null to all but the last to come,
/// after that one has called meeting_ends; to the last the arguments, in the order of threads.
/// @param aligned whether all have to come from the same line of the source
void** meet(const char* what, int first, int size, uint32_t mask, bool aligned, void* argument, const Location& at);
void meeting_ends(void** arguments);

/// perform(Argument* const (&arguments)[32]) once for all lanes of `mask` of this warp; null for the other lanes.
template <typename Argument, typename Perform>
void warp_collective(
    const char* what, uint32_t mask, bool aligned, Argument& argument, const Location& at, const Perform& perform) {
  if (void** all = meet(what, this_warp() * kWarpSize, kWarpSize, mask, aligned, &argument, at)) {
    perform(reinterpret_cast<Argument**>(all));
    meeting_ends(all);
  }
}

/// The same for the four warps of this warpgroup.
template <typename Argument, typename Perform>
void warpgroup_collective(const char* what, Argument& argument, const Location& at, const Perform& perform) {
  const int first = this_thread() / kWarpgroupSize * kWarpgroupSize;
  if (void** all = meet(what, first, kWarpgroupSize, ~0u, true, &argument, at)) {
    perform(reinterpret_cast<Argument**>(all));
    meeting_ends(all);
  }
}

/// bar.sync and bar.arrive. @param count of threads that take part; 0: all of the block that have not ended
void named_barrier(int id, int count, bool waits, const Location& at);

}  // namespace linearard::emulation
