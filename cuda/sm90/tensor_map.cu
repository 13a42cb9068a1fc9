#include "tensor_map.h"

#include "schedule.cuh"

namespace linearard::cuda::sm90 {
namespace {

constexpr int kChunk = 64;
constexpr uint64_t kElementBytes = 2;
constexpr uint64_t kLargestStride = uint64_t{1} << 40;

/// A dimension of one element is never stepped over: its stride may be anything.
uint64_t byte_stride(int64_t elements, int size) {
  return size > 1 ? static_cast<uint64_t>(elements) * kElementBytes : 16;
}

bool is_valid_stride(int64_t elements, int size) {
  return size <= 1 || (elements >= 0 && byte_stride(elements, size) % 16 == 0 &&
                       byte_stride(elements, size) < kLargestStride);
}

}  // namespace

bool can_map(const Vectors& v, int batch, int heads) {
  return v.aligned && v.group == 1 && is_valid_stride(v.batch_stride, batch) && is_valid_stride(v.head_stride, heads) &&
         is_valid_stride(v.token_stride, 2);
}

cudaError_t map_vectors(CUtensorMap& map, const Vectors& v, int batch, int heads, int tokens) {
  return encode_tensor_map(
      map, {v.data,
            false,
            {static_cast<uint64_t>(v.dim), static_cast<uint64_t>(tokens), static_cast<uint64_t>(heads),
             static_cast<uint64_t>(batch)},
            {byte_stride(v.token_stride, tokens), byte_stride(v.head_stride, heads),
             byte_stride(v.batch_stride, batch)},
            {kChunk, kTileTokens, 1, 1},
            true});
}

cudaError_t map_token_values(CUtensorMap& map, const void* values, int heads, int tokens) {
  constexpr uint64_t kBytes = 4 * sizeof(float);
  const uint64_t head_bytes = static_cast<uint64_t>(tokens) * kBytes;
  return encode_tensor_map(map, {values,
                                 true,
                                 {4, static_cast<uint64_t>(tokens), static_cast<uint64_t>(heads), 1},
                                 {kBytes, head_bytes, head_bytes * static_cast<uint64_t>(heads)},
                                 {4, kTileTokens, 1, 1},
                                 false});
}

}  // namespace linearard::cuda::sm90
