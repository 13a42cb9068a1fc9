#pragma once

#include <array>
#include <cstdint>

#include "shared_memory.h"

// The instructions on 8 x 8 and 16 x 16 matrices of 16-bit elements that a warp holds in its registers, written from
// the tables of fragments in the PTX ISA: ldmatrix, stmatrix, movmatrix, mma.

namespace linearard::emulation {

using Matrix = std::array<std::array<uint16_t, 8>, 8>;

/// Lane l of an 8 x 8 matrix holds elements (l / 4, 2 (l % 4)) and, in the high half, (l / 4, 2 (l % 4) + 1).
inline uint32_t fragment_of(const Matrix& matrix, int lane) {
  const auto& row = matrix[lane / 4];
  return row[2 * (lane % 4)] | static_cast<uint32_t>(row[2 * (lane % 4) + 1]) << 16;
}

inline void set_fragment(Matrix& matrix, int lane, uint32_t fragment) {
  matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(fragment);
  matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(fragment >> 16);
}

inline Matrix transposed(const Matrix& matrix) {
  Matrix result;
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j)
      result[j][i] = matrix[i][j];
  return result;
}

template <int kCount>
struct MatrixAccess {
  uint32_t address;
  uint32_t registers[kCount];
};

/// Lane l gives the address of row l % 8 of matrix l / 8.
template <int kCount>
void load_matrices(uint32_t (&registers)[kCount], uint32_t shared, bool transpose, const Location& at) {
  MatrixAccess<kCount> mine{shared, {}};
  warp_collective("ldmatrix", ~0u, true, mine, at, [&](MatrixAccess<kCount>* const* lanes) {
    for (int m = 0; m < kCount; ++m) {
      Matrix matrix;
      for (int row = 0; row < 8; ++row)
        __builtin_memcpy(matrix[row].data(), shared_access(lanes[m * 8 + row]->address, 16, 16, at), 16);
      if (transpose) matrix = transposed(matrix);
      for (int lane = 0; lane < kWarpSize; ++lane)
        lanes[lane]->registers[m] = fragment_of(matrix, lane);
    }
  });
  for (int m = 0; m < kCount; ++m)
    registers[m] = mine.registers[m];
}

template <int kCount>
void store_matrices(uint32_t shared, const uint32_t (&registers)[kCount], bool transpose, const Location& at) {
  MatrixAccess<kCount> mine{shared, {}};
  for (int m = 0; m < kCount; ++m)
    mine.registers[m] = registers[m];
  warp_collective("stmatrix", ~0u, true, mine, at, [&](MatrixAccess<kCount>* const* lanes) {
    for (int m = 0; m < kCount; ++m) {
      Matrix matrix;
      for (int lane = 0; lane < kWarpSize; ++lane)
        set_fragment(matrix, lane, lanes[lane]->registers[m]);
      if (transpose) matrix = transposed(matrix);
      for (int row = 0; row < 8; ++row)
        __builtin_memcpy(matrix_write(lanes[m * 8 + row]->address, 16, this_warp() * kWarpSize + m * 8 + row, at),
                         matrix[row].data(), 16);
    }
  });
}

/// movmatrix.trans: the transpose of a matrix that the warp holds.
inline uint32_t transpose_matrix(uint32_t fragment, const Location& at) {
  warp_collective("movmatrix", ~0u, true, fragment, at, [](uint32_t* const* lanes) {
    Matrix matrix;
    for (int lane = 0; lane < kWarpSize; ++lane)
      set_fragment(matrix, lane, *lanes[lane]);
    matrix = transposed(matrix);
    for (int lane = 0; lane < kWarpSize; ++lane)
      *lanes[lane] = fragment_of(matrix, lane);
  });
  return fragment;
}

/// d += a b, a 16 x 16 and b 16 x 8 (as columns) of `T`, d 16 x 8 of float. Sums are formed in double and rounded once;
/// a GPU rounds less well.
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Location& at);

}  // namespace linearard::emulation
