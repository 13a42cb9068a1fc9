#include "fiber.h"

#include <new>

#include <sys/mman.h>
#include <unistd.h>

namespace linearard::emulation {

Fiber::Fiber(size_t stack_bytes) : bytes_(stack_bytes) {
  stack_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack_ == MAP_FAILED) throw std::bad_alloc();
  // An overflow ends in a segmentation fault and not in the neighbour's stack.
  mprotect(stack_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
}

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, bytes_);
}

void Fiber::prepare(void (*entry)()) {
  getcontext(&start_);
  start_.uc_stack.ss_sp = stack_;
  start_.uc_stack.ss_size = bytes_;
  start_.uc_link = nullptr;
  makecontext(&start_, entry, 0);
  fresh_ = true;
}

void Fiber::switch_to(Fiber& to) {
  if (_setjmp(jump_) != 0) return;
  if (to.fresh_) {
    to.fresh_ = false;
    setcontext(&to.start_);
  }
  _longjmp(to.jump_, 1);
}

}  // namespace linearard::emulation
