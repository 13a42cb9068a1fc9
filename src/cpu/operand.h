#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "cpu/kernels/tile_kernels.h"
#include "logit_form.h"
#include "row_sets.h"

namespace linearard::cpu {

/// A matrix cut into blocks of rows: the views that tiles multiply, made once instead of for each tile.
struct BlockedMatrix {
  at::Tensor whole;                    ///< [n, D]; undefined where the logit form does not need it
  std::vector<at::Tensor> blocks;      ///< [tile rows, D]
  std::vector<at::Tensor> transposed;  ///< [D, tile rows]

  BlockedMatrix() = default;
  BlockedMatrix(at::Tensor matrix, int64_t tile_rows);
};

/// The rows of one head of one sequence, packed as the tiles need them. float32 rows without holes are used in place.
struct Operand {
  int64_t length = 0;
  BlockedMatrix student;   ///< x, times the form's multiplier
  BlockedMatrix gradient;  ///< the same for products with G: zeros where x is not finite, because 0 x NaN is not 0
  BlockedMatrix teacher;   ///< y, times the form's multiplier
  BlockedMatrix scaled_student;  ///< difference form: x in the teacher's scale
  BlockedMatrix difference;      ///< difference form: x in the teacher's scale minus y

  /// @param student [N, Ds], teacher [N, Dt]: one head
  Operand(const at::Tensor& student,
          const at::Tensor& teacher,
          const RowSet& rows,
          const LogitForm& form,
          int64_t tile_rows);
};

/// Packed rows of one side only, as relation_lse needs them.
at::Tensor pack_rows(const at::Tensor& head, const RowSet& rows, at::ScalarType dtype, double multiplier);

/// Tile buffers of all threads of a call.
class TileBuffers {
 public:
  TileBuffers(int64_t tile_rows, at::ScalarType dtype);
  /// The calling thread's buffers: [2, tile_rows, stride].
  at::Tensor of_this_thread() const;
  static int64_t bytes(int64_t tile_rows, at::ScalarType dtype);

 private:
  at::Tensor buffers_;
};

/// Compute the two products of tile (row_block, column_block) and scale them to t and delta.
template <typename Real>
struct LogitTile {
  at::Tensor teacher;     ///< [rows, columns] view of the thread's buffer
  at::Tensor difference;  ///< likewise
  Tile<Real> tile;        ///< the same memory

  LogitTile(const LogitForm& form,
            const Operand& rows,
            int64_t row_block,
            const Operand& columns,
            int64_t column_block,
            const at::Tensor& buffers);
};

}  // namespace linearard::cpu
