#pragma once

#include "../common/device_math.cuh"
#include "../common/visibility.cuh"
#include "instructions.cuh"

// Tiles of the tensor-core kernels: vectors in shared memory, logits in registers. A block of 4 warps owns
// kOwners tokens and visits the others kOthers at a time; a warp owns 16 x kSlabs of the rows.

namespace linearard::cuda::mma {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kOthers = 32;  ///< columns of a tile
inline constexpr int kColumnGroups = kOthers / 8;
inline constexpr int kStages = 2;

/// Whether one of `count` numbers is not 0; asked by all threads of the block together.
__device__ inline bool is_any(const int* numbers, int count) {
  int any = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    any |= numbers[i];
  return __syncthreads_or(any) != 0;
}

/// Before a block of threads begins another block of tokens: no thread reads, and no copy is under way.
__device__ inline void leave_shared_memory() {
  copy_commit();
  copy_wait<0>();
  __syncthreads();
}

/// Rows of shared memory with kDim elements of 2 bytes in chunks of 16 bytes, placed so that the 8 rows of a matrix
/// load lie in different banks: by exclusive or where the chunks of a row are a multiple of 8, else by one more chunk.
template <int kDim>
struct Layout {
  static constexpr int kChunks = kDim / 8;
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kStride = kSwizzled ? kChunks : kChunks + 1;
  static constexpr int kRowBytes = kStride * 16;
  static_assert(kSwizzled || kStride % 2 == 1, "rows of a matrix load would meet in a bank");

  __device__ static int offset(int row, int chunk) {
    return (row * kStride + (kSwizzled ? chunk ^ (row & 7) : chunk)) * 16;
  }

  /// The address `pairs` pairs of chunks after one of chunk 0 or 1 of the same row: cheap, so that a loop over the
  /// dimension keeps one address in registers and not all of them.
  __device__ static uint32_t advance(uint32_t address, int pairs) {
    return kSwizzled ? (address ^ ((pairs % 4) << 5)) + pairs / 4 * 128 : address + pairs * 32;
  }
};

template <int kDim, int kSlabs>
struct Shape {
  static constexpr int kOwners = kWarps * kSlabs * 16;
  using Rows = Layout<kDim>;
  static constexpr int kOwnerBytes = kOwners * Rows::kRowBytes;
  static constexpr int kOtherBytes = kOthers * Rows::kRowBytes;

  // Shared memory: owners' student and teacher vectors, then for each stage the others' (the columns' values follow).
  static constexpr int kOwnerTeacher = kOwnerBytes;
  static constexpr int kOther = 2 * kOwnerBytes;
  static constexpr int kColumns = kOther + kStages * 2 * kOtherBytes;
};

/// Up to 8 elements one by one, for addresses that a copy of 16 bytes cannot read.
template <typename T>
__device__ void load_chunk(uint32_t shared, const T* source, int count) {
#pragma unroll 1
  for (int e = 0; e < 8; ++e) {
    const T x = e < count ? source[e] : T(0.f);
    store_shared_16(shared + 2 * e, *reinterpret_cast<const uint16_t*>(&x));
  }
}

/// Copies `kRows` tokens from `first` on; zeros for tokens that do not exist or are padding, and beyond the dimension.
/// @param list if not null: the tokens are list[first], list[first + 1], ..., `count` in all
template <typename T, int kDim, int kRows>
__device__ void load_tokens(uint32_t shared,
                            const T* head,
                            const Vectors& v,
                            int first,
                            int count,
                            const uint8_t* mask,
                            const int* list = nullptr) {
  using Rows = Layout<kDim>;
  constexpr int kPieces = kRows * Rows::kChunks;
  const auto load = [&](int piece, bool aligned) {
    const int row = piece / Rows::kChunks;
    const int chunk = piece % Rows::kChunks;
    const bool exists = first + row < count;
    const int token = list != nullptr && exists ? list[first + row] : first + row;
    const bool valid = exists && chunk * 8 < v.dim && (mask == nullptr || mask[token] != 0);
    const T* source = head + (valid ? token * v.token_stride + chunk * 8 : 0);
    const uint32_t to = shared + Rows::offset(row, chunk);
    if (aligned) {
      copy_async(to, source, valid);
    } else {
      load_chunk(to, source, valid ? v.dim - chunk * 8 : 0);
    }
  };
  if (!v.aligned) {
#pragma unroll 1
    for (int piece = static_cast<int>(threadIdx.x); piece < kPieces; piece += kThreads)
      load(piece, false);
    return;
  }
#pragma unroll 4
  for (int base = 0; base < kPieces; base += kThreads) {
    const int piece = base + static_cast<int>(threadIdx.x);
    if (kPieces % kThreads == 0 || piece < kPieces) load(piece, true);
  }
}

/// logits += owners x others^T for the 16 kSlabs rows of a warp.
template <typename T, int kDim, int kSlabs, int kUnrolled = 4>
__device__ void multiply_tile(float (&logits)[kSlabs][kColumnGroups][4],
                              uint32_t owners,
                              uint32_t others,
                              int warp_row) {
  using Rows = Layout<kDim>;
  // Addresses are cheap to compute, and many: kept from tile to tile they would spill what is needed.
  const int lane = anew(static_cast<int>(threadIdx.x)) % 32;
  const uint32_t a_address = owners + Rows::offset(warp_row + lane % 16, lane / 16);
  const uint32_t b_address = others + Rows::offset((lane / 16) * 8 + lane % 8, (lane / 8) % 2);
#pragma unroll kUnrolled
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[kSlabs][4];
#pragma unroll
    for (int m = 0; m < kSlabs; ++m) {
      load_matrices(a[m], Rows::advance(a_address, k) + m * 16 * Rows::kRowBytes);
    }
#pragma unroll
    for (int n = 0; n < kColumnGroups; n += 2) {
      uint32_t b[4];
      load_matrices(b, Rows::advance(b_address, k) + n * 8 * Rows::kRowBytes);
#pragma unroll
      for (int m = 0; m < kSlabs; ++m) {
        multiply_add<T>(logits[m][n], a[m], b[0], b[1]);
        multiply_add<T>(logits[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// Products of vectors as logits, in logit units. s - t is formed from the raw products, whose difference is exact
/// where they are close: scaling s and t first would round both.
struct LogitScales {
  float teacher;
  float student;
  float excess;  ///< student - teacher

  __device__ LogitScales(double scale_student, double scale_teacher)
      : teacher(static_cast<float>(scale_teacher * Base<float>::kUnit)),
        student(static_cast<float>(scale_student * Base<float>::kUnit)),
        excess(static_cast<float>((scale_student - scale_teacher) * Base<float>::kUnit)) {}

  __device__ float logit(float product_teacher) const { return product_teacher * teacher; }
  __device__ float difference(float product_student, float product_teacher) const {
    return fmaf(product_teacher, excess, (product_student - product_teacher) * student);
  }
};

/// A thread's elements of a tile: logits[m][n][c] is row m * 16 + lane / 4 + 8 (c / 2), column n * 8 + 2 (lane % 4) +
/// c % 2 of its warp's rows. Bit (m * kColumnGroups + n) * 4 + c of a mask stands for it.
__device__ inline int row_in_slab(int half) { return (static_cast<int>(threadIdx.x) % 32) / 4 + 8 * half; }
__device__ inline int column_of(int n, int c) { return n * 8 + 2 * (static_cast<int>(threadIdx.x) % 4) + c % 2; }
__device__ constexpr int bit_of(int m, int n, int c) { return (m * kColumnGroups + n) * 4 + c; }

/// Sum over the 4 threads that share a row.
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float maximum_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace linearard::cuda::mma
