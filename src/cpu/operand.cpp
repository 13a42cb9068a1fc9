#include "cpu/operand.h"

#include <algorithm>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/zeros.h>

namespace linearard::cpu {

BlockedMatrix::BlockedMatrix(at::Tensor matrix, int64_t tile_rows) : whole(std::move(matrix)) {
  for (int64_t begin = 0; begin < whole.size(0); begin += tile_rows) {
    blocks.push_back(whole.narrow(0, begin, std::min(tile_rows, whole.size(0) - begin)));
    transposed.push_back(blocks.back().t());
  }
}

at::Tensor pack_rows(const at::Tensor& head, const RowSet& rows, at::ScalarType dtype, double multiplier) {
  at::Tensor packed = take_rows(head, rows).to(dtype);
  if (multiplier != 1) packed = packed * multiplier;
  // Rows that overlap (expanded inputs) are no matrix to a BLAS, which would copy them for each tile.
  const bool is_matrix = packed.stride(1) == 1 && packed.stride(0) >= packed.size(1);
  return is_matrix ? packed : packed.contiguous();
}

Operand::Operand(const at::Tensor& student_head,
                 const at::Tensor& teacher_head,
                 const RowSet& rows,
                 const LogitForm& form,
                 int64_t tile_rows)
    : length(rows.length),
      student(pack_rows(student_head, rows, form.compute, form.student_multiplier), tile_rows),
      teacher(pack_rows(teacher_head, rows, form.compute, form.teacher_multiplier), tile_rows) {
  gradient = form.finite ? student : BlockedMatrix(at::nan_to_num(student.whole, 0, 0, 0), tile_rows);
  const ScaledDifference scaled = scaled_difference(student.whole, teacher.whole, form);
  if (!scaled.difference.defined()) return;
  difference = BlockedMatrix(scaled.difference, tile_rows);
  scaled_student = form.student_ratio == 1 ? student : BlockedMatrix(scaled.scaled_student, tile_rows);
}

namespace {

int64_t padded(int64_t columns) { return (columns + kVectorPadding - 1) / kVectorPadding * kVectorPadding; }

}  // namespace

TileBuffers::TileBuffers(int64_t tile_rows, at::ScalarType dtype)
    : buffers_(at::zeros({at::get_num_threads(), 2, tile_rows, padded(tile_rows)}, dtype)) {}

at::Tensor TileBuffers::of_this_thread() const { return buffers_.select(0, at::get_thread_num()); }

int64_t TileBuffers::bytes(int64_t tile_rows, at::ScalarType dtype) {
  return int64_t{at::get_num_threads()} * 2 * tile_rows * padded(tile_rows) *
         static_cast<int64_t>(c10::elementSize(dtype));
}

template <typename Real>
LogitTile<Real>::LogitTile(const LogitForm& form,
                           const Operand& rows,
                           int64_t row_block,
                           const Operand& columns,
                           int64_t column_block,
                           const at::Tensor& buffers) {
  const at::Tensor& y_rows = rows.teacher.blocks[row_block];
  const at::Tensor& y_columns = columns.teacher.transposed[column_block];
  const int64_t row_count = y_rows.size(0);
  const int64_t column_count = y_columns.size(1);
  const int64_t stride = buffers.size(2);
  teacher = buffers.as_strided({row_count, column_count}, {stride, 1}, buffers.storage_offset());
  difference = buffers.as_strided({row_count, column_count}, {stride, 1}, buffers.storage_offset() + buffers.stride(0));
  at::mm_out(teacher, y_rows, y_columns);
  const bool by_difference = rows.difference.whole.defined() && columns.difference.whole.defined();
  if (by_difference) {
    at::mm_out(difference, rows.difference.blocks[row_block], columns.scaled_student.transposed[column_block]);
    at::addmm_out(difference, difference, y_rows, columns.difference.transposed[column_block]);
  } else {
    at::mm_out(difference, rows.student.blocks[row_block], columns.student.transposed[column_block]);
  }
  tile = {
      teacher.mutable_data_ptr<Real>(), difference.mutable_data_ptr<Real>(), row_count, column_count, stride, nullptr};
  const double second = by_difference ? form.scale_teacher : form.scale_student;
  tile_kernels<Real>().scale_tile(tile,
                                  {static_cast<Real>(form.scale_teacher), static_cast<Real>(second), !by_difference});
}

template struct LogitTile<float>;
template struct LogitTile<double>;

}  // namespace linearard::cpu
