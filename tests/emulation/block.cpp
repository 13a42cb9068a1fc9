#include "block.h"

#include <algorithm>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include "cuda_runtime_shim.h"
#include "fiber.h"

namespace linearard::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kLargestBlock = 1024;
constexpr int kBarriers = 16;

enum class State { kReady, kWaiting, kEnded };

struct Thread {
  std::unique_ptr<Fiber> fiber = std::make_unique<Fiber>(kStackBytes);
  State state = State::kReady;
  uint3 index{};
  const char* waits_for = "";
  Location at;
};

struct Meeting {
  const char* what;
  int first;
  int size;
  uint32_t mask;
  Location at;
  int missing;
  std::vector<void*> arguments;
  std::vector<int> threads;  ///< those that wait

  bool expects(int thread) const {
    return thread >= first && thread < first + size && (mask >> (thread - first) % kWarpSize & 1u) != 0;
  }
};

struct Barrier {
  int count = 0;
  int arrived = 0;
  std::vector<int> threads;
};

/// The block that runs. One at a time: CUDA's built-in variables are global.
struct Block {
  std::vector<Thread> threads;
  int count = 0;
  int ended = 0;
  int running = -1;
  Fiber scheduler;
  const std::function<void()>* kernel = nullptr;
  std::list<Meeting> meetings;
  Barrier barriers[kBarriers];
  std::deque<std::function<void()>> deferred;
  std::string error;
  uint32_t seed = 0;
  std::minstd_rand random;
  std::vector<Hooks> hooks;
};

Block& block() {
  static Block instance;
  return instance;
}

std::string place(const Location& at) {
  const std::string file = at.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(at.line());
}

/// "threads 0-31, 40" of increasing numbers.
std::string list_of(const std::vector<int>& numbers) {
  std::ostringstream out;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1)
      ++last;
    out << (i == 0 ? "" : ", ") << numbers[i];
    if (last > i) out << '-' << numbers[last];
    i = last + 1;
  }
  return out.str();
}

/// Where the threads of the block are, one line for each place.
std::string where_threads_wait() {
  std::map<std::string, std::vector<int>> places;
  const Block& b = block();
  for (int i = 0; i < b.count; ++i) {
    const Thread& thread = b.threads[i];
    if (thread.state == State::kEnded) places["have ended"].push_back(i);
    if (thread.state == State::kReady) places["can go on"].push_back(i);
    if (thread.state == State::kWaiting) {
      places["wait for " + std::string(thread.waits_for) + " at " + place(thread.at)].push_back(i);
    }
  }
  std::string text;
  for (const auto& [what, threads] : places)
    text += "\n  threads " + list_of(threads) + " " + what;
  return text;
}

void to_scheduler() {
  Block& b = block();
  b.threads[b.running].fiber->switch_to(b.scheduler);
}

void finish(Barrier& barrier) {
  for (const int thread : barrier.threads)
    wake(thread);
  barrier = {};
}

/// Threads that have ended are no longer waited for by barriers of the whole block.
void end_thread() {
  Block& b = block();
  for (const Hooks& hooks : b.hooks)
    if (hooks.thread_ends) hooks.thread_ends();
  b.threads[b.running].state = State::kEnded;
  ++b.ended;
  Barrier& all = b.barriers[0];
  if (all.count == 0 && all.arrived > 0 && all.arrived == b.count - b.ended) finish(all);
}

void thread_entry() {
  (*block().kernel)();
  end_thread();
  to_scheduler();
}

void run_thread(int number) {
  Block& b = block();
  b.running = number;
  threadIdx = b.threads[number].index;
  b.scheduler.switch_to(*b.threads[number].fiber);
  b.running = -1;
  if (!b.error.empty()) throw Error(b.error);
}

bool warp_can_run(int warp) {
  const Block& b = block();
  for (int i = warp * kWarpSize; i < std::min(b.count, (warp + 1) * kWarpSize); ++i)
    if (b.threads[i].state == State::kReady) return true;
  return false;
}

/// A warp with a thread that can go on, at or after `from`; -1 where there is none.
int next_warp(int from) {
  Block& b = block();
  const int warps = (b.count + kWarpSize - 1) / kWarpSize;
  const int start = b.seed == 0 ? from : static_cast<int>(b.random() % static_cast<unsigned>(warps));
  for (int i = 0; i < warps; ++i) {
    const int warp = (start + i) % warps;
    if (warp_can_run(warp)) return warp;
  }
  return -1;
}

void run_threads() {
  Block& b = block();
  int warp = -1;
  while (b.ended < b.count) {
    warp = next_warp(warp + 1);
    if (warp >= 0) {
      for (int i = warp * kWarpSize; i < std::min(b.count, (warp + 1) * kWarpSize); ++i)
        if (b.threads[i].state == State::kReady) run_thread(i);
    } else if (!b.deferred.empty()) {
      const size_t which = b.seed == 0 ? 0 : b.random() % b.deferred.size();
      const std::function<void()> work = std::move(b.deferred[which]);
      b.deferred.erase(b.deferred.begin() + static_cast<std::ptrdiff_t>(which));
      work();
      if (!b.error.empty()) throw Error(b.error);
    } else {
      std::string text = "deadlock: no thread of block " + std::to_string(blockIdx.x) + " can go on";
      text += where_threads_wait();
      for (const Hooks& hooks : b.hooks)
        if (hooks.explain_deadlock) text += hooks.explain_deadlock();
      throw Error(text);
    }
  }
  if (!b.deferred.empty()) throw Error("a block has ended before its asynchronous copies have landed");
}

void run_block(size_t shared_bytes) {
  Block& b = block();
  b.ended = 0;
  b.meetings.clear();
  b.deferred.clear();
  for (Barrier& barrier : b.barriers)
    barrier = {};
  for (const Hooks& hooks : b.hooks)
    if (hooks.block_begins) hooks.block_begins(shared_bytes);
  for (int i = 0; i < b.count; ++i) {
    const unsigned plane = blockDim.x * blockDim.y;
    const auto number = static_cast<unsigned>(i);
    b.threads[i].index = {number % blockDim.x, number % plane / blockDim.x, number / plane};
    b.threads[i].state = State::kReady;
    b.threads[i].fiber->prepare(thread_entry);
  }
  run_threads();
}

}  // namespace

void run_grid(dim3 grid, dim3 block_shape, size_t shared_bytes, const std::function<void()>& kernel) {
  Block& b = block();
  b.count = static_cast<int>(block_shape.x * block_shape.y * block_shape.z);
  if (b.count < 1 || b.count > kLargestBlock) {
    throw Error("a block has 1 to 1024 threads, got " + std::to_string(b.count));
  }
  if (b.threads.size() < static_cast<size_t>(b.count)) b.threads.resize(b.count);
  b.kernel = &kernel;
  b.error.clear();
  b.random.seed(b.seed + 1);
  gridDim = grid;
  blockDim = block_shape;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(shared_bytes);
      }
}

void set_schedule(uint32_t seed) { block().seed = seed; }

void add_hooks(Hooks hooks) { block().hooks.push_back(std::move(hooks)); }

int this_thread() { return block().running; }

int thread_count() { return block().count; }

void fail(const std::string& message, const Location& at) {
  Block& b = block();
  std::ostringstream text;
  text << place(at) << ": ";
  if (b.running >= 0) text << "thread " << b.running << " of block " << blockIdx.x << ": ";
  text << message;
  b.error = text.str();
  if (b.running < 0) throw Error(b.error);
  to_scheduler();
  __builtin_unreachable();
}

void wait(const char* what, const Location& at) {
  Block& b = block();
  Thread& thread = b.threads[b.running];
  thread.state = State::kWaiting;
  thread.waits_for = what;
  thread.at = at;
  to_scheduler();
}

void wake(int thread) { block().threads[thread].state = State::kReady; }

void defer(std::function<void()> work) { block().deferred.push_back(std::move(work)); }

void** meet(const char* what, int first, int size, uint32_t mask, bool aligned, void* argument, const Location& at) {
  Block& b = block();
  const int self = b.running;
  if (first + size > b.count) fail(std::string(what) + ": the block ends within the warp or warpgroup", at);
  if ((mask >> self % kWarpSize & 1u) == 0) fail(std::string(what) + ": the mask lacks the lane that uses it", at);
  auto meeting = b.meetings.end();
  for (auto other = b.meetings.begin(); other != b.meetings.end(); ++other) {
    if (!other->expects(self)) continue;
    const bool same = other->what == std::string(what) && other->first == first && other->size == size &&
                      other->mask == mask && (!aligned || place(other->at) == place(at));
    if (same) meeting = other;
    // Other warps of a warpgroup may come later.
    const bool of_my_warp = std::any_of(other->threads.begin(), other->threads.end(),
                                        [&](int thread) { return thread / kWarpSize == self / kWarpSize; });
    const bool of_my_group = other->size == size && size > kWarpSize;
    if (!same && (of_my_warp || of_my_group)) {
      fail(std::string(what) + ": threads that go together diverge: others are in " + other->what + " at " +
               place(other->at) + where_threads_wait(),
           at);
    }
  }
  if (meeting == b.meetings.end()) {
    const int expected = size / kWarpSize * __builtin_popcount(mask);
    b.meetings.push_back({what, first, size, mask, at, expected, std::vector<void*>(size), {}});
    meeting = std::prev(b.meetings.end());
  }
  for (int i = first; i < first + size; ++i) {
    if (meeting->expects(i) && b.threads[i].state == State::kEnded) {
      fail(std::string(what) + ": waits for thread " + std::to_string(i) + ", which has ended", at);
    }
  }
  meeting->arguments[self - first] = argument;
  if (--meeting->missing == 0) return meeting->arguments.data();
  meeting->threads.push_back(self);
  wait(what, at);
  return nullptr;
}

void meeting_ends(void** arguments) {
  Block& b = block();
  for (auto meeting = b.meetings.begin(); meeting != b.meetings.end(); ++meeting) {
    if (meeting->arguments.data() != arguments) continue;
    for (const int thread : meeting->threads)
      wake(thread);
    b.meetings.erase(meeting);
    return;
  }
}

void named_barrier(int id, int count, bool waits, const Location& at) {
  Block& b = block();
  if (id < 0 || id >= kBarriers) fail("a block has barriers 0 to 15, got " + std::to_string(id), at);
  if (count % kWarpSize != 0) fail("a barrier takes whole warps, got " + std::to_string(count) + " threads", at);
  Barrier& barrier = b.barriers[id];
  if (barrier.arrived > 0 && barrier.count != count) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(barrier.count) + " threads is used with " +
             std::to_string(count),
         at);
  }
  barrier.count = count;
  ++barrier.arrived;
  if (barrier.arrived == (count == 0 ? b.count - b.ended : count)) {
    finish(barrier);
  } else if (waits) {
    barrier.threads.push_back(b.running);
    wait("a barrier", at);
  }
}

}  // namespace linearard::emulation
