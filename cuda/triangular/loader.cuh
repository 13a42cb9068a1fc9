#pragma once

#include "../mma/tiles.cuh"

namespace linearard::cuda::triangular {

/// Copies tiles of tokens of one head into shared memory, zeros for tokens that do not exist or are padding and beyond
/// the dimension. A thread always copies the same chunk of its tokens, so that one address moves along instead of being
/// computed for every piece. Vectors have to be aligned (params.h).
template <typename T, int kDim, int kRows>
class TileLoader {
  using Rows = mma::Layout<kDim>;
  static constexpr int kStep = mma::kThreads / Rows::kChunks;  ///< tokens between a thread's pieces
  static constexpr int kPieces = (kRows + kStep - 1) / kStep;
  static constexpr bool kSameSwizzle = !Rows::kSwizzled || kStep % 8 == 0;

 public:
  __device__ TileLoader(const Vectors& vectors, int batch, int head, int count, const uint8_t* mask, int thread)
      : vectors_(vectors),
        head_(head_of<T>(vectors, batch, head)),
        mask_(mask),
        count_(count),
        row_(thread / Rows::kChunks),
        chunk_(thread % Rows::kChunks) {}

  __device__ void load(uint32_t shared, int first) const {
    if (row_ >= kStep) return;  // threads left over where the chunks do not divide them
    const T* source = head_ + (first + row_) * vectors_.token_stride + chunk_ * 8;
    const uint32_t to = shared + Rows::offset(row_, chunk_);
    if (mask_ == nullptr && first + kRows <= count_ && vectors_.dim == kDim) {
#pragma unroll 4
      for (int piece = 0; piece < kPieces; ++piece) {
        if (kRows % kStep != 0 && row_ + piece * kStep >= kRows) break;
        copy_async(place(shared, to, piece), source);
        source += kStep * vectors_.token_stride;
      }
      return;
    }
    const bool inside = chunk_ * 8 < vectors_.dim;
#pragma unroll 4
    for (int piece = 0; piece < kPieces; ++piece) {
      const int row = row_ + piece * kStep;
      if (kRows % kStep != 0 && row >= kRows) break;
      const int token = first + row;
      const bool valid = inside && token < count_ && (mask_ == nullptr || mask_[token] != 0);
      copy_async(place(shared, to, piece), valid ? source : head_, valid);
      source += kStep * vectors_.token_stride;
    }
  }

 private:
  const Vectors& vectors_;
  const T* head_;
  const uint8_t* mask_;
  int count_;
  int row_;
  int chunk_;

  /// @param to place of the first piece
  __device__ uint32_t place(uint32_t shared, uint32_t to, int piece) const {
    return kSameSwizzle ? to + piece * kStep * Rows::kRowBytes : shared + Rows::offset(row_ + piece * kStep, chunk_);
  }
};

}  // namespace linearard::cuda::triangular
