#pragma once

#include <cstdint>

#include "block.h"

// Shared memory of the emulated block. Addresses are those of the shared state space: 32 bits, here with an offset so
// that 0 is none. Memory that has not been written holds NaN in every floating-point type.

namespace linearard::emulation {

/// Where the block's dynamic shared memory begins; aligned to 1024 bytes as the copy engine's swizzle wants it.
char* dynamic_shared_memory();

/// The address of a pointer into dynamic shared memory.
uint32_t shared_address_of(const void* pointer, const Location& at);

/// The memory behind an address, for an access of `bytes` that are aligned to `alignment`. Fails where it lies outside
/// the block's memory, is not aligned, or still waits for an asynchronous copy.
char* shared_access(uint32_t address, size_t bytes, size_t alignment, const Location& at);

template <typename T>
T read_shared(uint32_t address, const Location& at) {
  T value;
  __builtin_memcpy(&value, shared_access(address, sizeof(T), sizeof(T), at), sizeof(T));
  return value;
}

template <typename T>
void write_shared(uint32_t address, T value, const Location& at) {
  __builtin_memcpy(shared_access(address, sizeof(T), sizeof(T), at), &value, sizeof(T));
}

/// Position within dynamic shared memory, for messages.
int64_t offset_of(uint32_t address);

/// A matrix instruction's thread writes these bytes: the copy engine and the tensor cores of sm_90 see them after a
/// fence of that thread. Writes through pointers are not followed.
char* matrix_write(uint32_t address, size_t bytes, int thread, const Location& at);
/// fence.proxy.async of the running thread.
void fence_async_proxy();
/// Memory that the copy engine or the tensor cores of sm_90 read. Fails where shared_access does and where a fence is
/// missing.
const char* async_read(uint32_t address, size_t bytes, size_t alignment, const Location& at);

/// An asynchronous copy to these bytes begins: they hold NaN, and nothing may touch them until it has landed.
void copy_begins(uint32_t address, size_t bytes, const Location& at);
/// It has landed: the bytes may be used. Returns the memory, for the copy itself.
char* copy_lands(uint32_t address, size_t bytes);

}  // namespace linearard::emulation
