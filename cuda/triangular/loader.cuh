#pragma once

#include "../mma/tiles.cuh"

namespace linearard::cuda::triangular {

/// Copies tiles of tokens of one head into shared memory. Where a thread always copies the same chunk of its tokens,
/// one address moves along instead of being computed for every piece.
template <typename T, int kDim, int kRows>
class TileLoader {
  using Rows = mma::Layout<kDim>;
  static constexpr int kRowsAtATime = mma::kThreads / Rows::kChunks;
  // The swizzle of all of a thread's pieces has to be the same as well.
  static constexpr bool kFixedChunk =
      mma::kThreads % Rows::kChunks == 0 && kRows % kRowsAtATime == 0 && (!Rows::kSwizzled || kRowsAtATime % 8 == 0);
  static constexpr int kStep = kFixedChunk ? kRowsAtATime : 1;  ///< tokens between a thread's pieces

 public:
  __device__ TileLoader(const Vectors& vectors, int batch, int head, int count, const uint8_t* mask)
      : vectors_(vectors),
        head_(head_of<T>(vectors, batch, head)),
        mask_(mask),
        count_(count),
        row_(static_cast<int>(threadIdx.x) / Rows::kChunks),
        chunk_(static_cast<int>(threadIdx.x) % Rows::kChunks) {}

  __device__ void load(uint32_t shared, int first) const {
    if (!kFixedChunk || !vectors_.aligned) {
      mma::load_tokens<T, kDim, kRows>(shared, head_, vectors_, first, count_, mask_);
      return;
    }
    const T* source = head_ + (first + row_) * vectors_.token_stride + chunk_ * 8;
    uint32_t to = shared + Rows::offset(row_, chunk_);
    if (mask_ == nullptr && first + kRows <= count_ && vectors_.dim == kDim) {
#pragma unroll 4
      for (int row = 0; row < kRows; row += kStep) {
        copy_async(to, source);
        source += kStep * vectors_.token_stride;
        to += kStep * Rows::kRowBytes;
      }
      return;
    }
    const bool inside = chunk_ * 8 < vectors_.dim;
#pragma unroll 4
    for (int row = 0; row < kRows; row += kStep) {
      const int token = first + row_ + row;
      const bool valid = inside && token < count_ && (mask_ == nullptr || mask_[token] != 0);
      copy_async(to, valid ? source : head_, valid);
      source += kStep * vectors_.token_stride;
      to += kStep * Rows::kRowBytes;
    }
  }

 private:
  const Vectors& vectors_;
  const T* head_;
  const uint8_t* mask_;
  int count_;
  int row_;
  int chunk_;
};

}  // namespace linearard::cuda::triangular
