#pragma once

#include <csetjmp>
#include <cstddef>

#include <ucontext.h>

namespace linearard::emulation {

/// A stack and a place to go on from. ucontext starts a fiber; later switches are _setjmp and _longjmp, which do not
/// ask the kernel about signal masks as swapcontext does.
class Fiber {
 public:
  Fiber() = default;  ///< the one that runs already
  explicit Fiber(size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// The next switch to this fiber calls `entry`, which must not return.
  void prepare(void (*entry)());
  /// Goes on at `to`, until somebody switches back to this one.
  void switch_to(Fiber& to);

 private:
  std::jmp_buf jump_;
  ucontext_t start_;
  void* stack_ = nullptr;
  size_t bytes_ = 0;
  bool fresh_ = false;
};

}  // namespace linearard::emulation
