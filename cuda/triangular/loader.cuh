#pragma once

#include "../mma/tiles.cuh"

namespace linearard::cuda::triangular {

/// Copies tiles of tokens of one head into shared memory, zeros for tokens that do not exist or are padding and beyond
/// the dimension. A thread always copies the same chunk of its tokens, so that one address moves along instead of being
/// computed for every piece. Vectors have to be aligned (params.h).
template <typename T, int kDim, int kRows>
class TileLoader {
  using Rows = mma::Layout<kDim>;
  static constexpr unsigned kStep = mma::kThreads / Rows::kChunks;  ///< tokens between a thread's pieces
  static constexpr unsigned kPieces = (kRows + kStep - 1) / kStep;
  static constexpr bool kSameSwizzle = !Rows::kSwizzled || kStep % 8 == 0;

 public:
  __device__ TileLoader(const T* head, int64_t token_stride, int dim, int count, const uint8_t* mask, unsigned thread)
      : head_(head),
        token_stride_(token_stride),
        dim_(dim),
        mask_(mask),
        count_(count),
        row_(thread / Rows::kChunks),
        chunk_(thread % Rows::kChunks) {}

  /// Whether a tile is there from the first to the last element.
  __device__ static bool is_whole(int dim, int first, int count, const uint8_t* mask) {
    return mask == nullptr && first + kRows <= count && dim == kDim;
  }

  /// @param whole what is_whole said
  __device__ void load(uint32_t shared, int first, bool whole) const {
    if (mma::kThreads % Rows::kChunks != 0 && row_ >= kStep) return;  // threads left over
    const T* source = head_ + (first + static_cast<int>(row_)) * token_stride_ + chunk_ * 8;
    const uint32_t to = shared + Rows::offset(row_, chunk_);
    if (whole) [[likely]] {
      const int64_t step = kStep * token_stride_;
#pragma unroll 4
      for (unsigned piece = 0; piece < kPieces; ++piece) {
        if (kRows % kStep != 0 && row_ + piece * kStep >= kRows) break;
        copy_async(place(shared, to, piece), source);
        source += step;
      }
    } else {
      load_partial(shared, first, source, to);
    }
  }

 private:
  const T* head_;
  int64_t token_stride_;
  int dim_;
  const uint8_t* mask_;
  int count_;
  unsigned row_;
  unsigned chunk_;

  __device__ void load_partial(uint32_t shared, int first, const T* source, uint32_t to) const {
    const bool inside = static_cast<int>(chunk_) * 8 < dim_;
#pragma unroll 1
    for (unsigned piece = 0; piece < kPieces; ++piece) {
      const unsigned row = row_ + piece * kStep;
      if (kRows % kStep != 0 && row >= kRows) break;
      const int token = first + static_cast<int>(row);
      const bool valid = inside && token < count_ && (mask_ == nullptr || mask_[token] != 0);
      copy_async(place(shared, to, piece), valid ? source : head_, valid);
      source += kStep * token_stride_;
    }
  }

  /// @param to place of the first piece
  __device__ uint32_t place(uint32_t shared, uint32_t to, unsigned piece) const {
    return kSameSwizzle ? to + piece * kStep * Rows::kRowBytes : shared + Rows::offset(row_ + piece * kStep, chunk_);
  }
};

}  // namespace linearard::cuda::triangular
