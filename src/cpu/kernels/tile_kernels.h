#pragma once

#include <cstdint>

// The element-wise work on one tile of logits. This interface and its implementation use neither torch nor the
// C++ library's templates: the implementation is compiled once per instruction set, and an inline function shared
// with the rest of the program could otherwise be linked in a version that this processor cannot run.

namespace linearard::cpu {

/// Widest vector of any instruction set, in elements of float: strides of tiles are multiples of it.
inline constexpr int64_t kVectorPadding = 16;

/// One tile of logits, rows x columns, `stride` elements between rows (a multiple of kVectorPadding).
template <typename Real>
struct Tile {
  Real* teacher;     ///< t_ij (before scale_tile: the inner products)
  Real* difference;  ///< delta_ij = s_ij - t_ij (before scale_tile: see TileScale)
  int64_t rows;
  int64_t columns;
  int64_t stride;
  const int64_t* visible;  ///< [rows] number of leading columns that each row sees; null: all
};

/// How the two products of a tile become t and delta.
template <typename Real>
struct TileScale {
  Real teacher;            ///< t = teacher * first product
  Real second;             ///< delta = second * second product, or s = second * second product:
  bool second_is_student;  ///< then delta = s - t
};

/// Running statistics of one row. Teacher sums are relative to exp(max_teacher), student's to exp(max_student).
struct RowStatistics {
  double max_teacher;
  double max_student;
  double shift;        ///< subtracted from delta: an estimate of lse_student - lse_teacher from the row's first tile
  double sum_teacher;  ///< sum exp(t - max_teacher)
  double sum_student;  ///< sum exp(s - max_student)
  double sum_delta;    ///< sum exp(t - max_teacher) (delta - shift)
  double sum_phi;      ///< sum exp(t - max_teacher) phi(delta - shift), phi(x) = expm1(x) - x
  bool started;        ///< false until the first tile: shift is unset
};

/// What the passes that follow the statistics need of each row (or column) of a tile.
template <typename Real>
struct RowReference {
  const Real* lse_teacher;     ///< [n]
  const Real* lse_difference;  ///< [n] lse_student - lse_teacher
  const Real* weight;          ///< [n] upstream gradient (gradient pass only)
  const Real* mean;            ///< [n] mean of psi(r_ij) under Q_i (gradient of reverse KL and JSD only)
  Real* sum;                   ///< [n] accumulates: of the pass (expectation) or sum_j G_ij (gradient)
  Real* probability;           ///< [n] accumulates sum_j Q_ij as computed (expectations that are means only)
  int64_t* dominant;           ///< [n] set to the key that has most of P_i, if it is of the tile (gradient, kRows);
  int64_t first_key;           ///< of the tile. Null: not wanted
};

/// Which entries of a tile a pass visits.
enum class TileKind {
  kRows,            ///< entry (i, j) for row i only, honouring `visible`
  kRowsColumns,     ///< entry (i, j) for row i and, the relation being symmetric, entry (j, i) for row j
  kDiagonal,        ///< a square tile on the diagonal, all rows; the gradient leaves out i == j
  kDiagonalCausal,  ///< the same with j <= i only; the gradient has j < i for row i and i < j for row j
};

enum class Expectation {
  kJsdValue,     ///< the value: contribution of one entry to the Jensen-Shannon divergence
  kReverseMean,  ///< Q_ij r_ij
  kJsdMean,      ///< Q_ij log(Q_ij / M_ij)
};

enum class Gradient { kForwardKL, kReverseKL, kJSD };

template <typename Real>
struct TileKernels {
  /// Number of Real in a vector.
  int64_t lanes;
  /// The two products of a tile become t and delta, in place.
  void (*scale_tile)(const Tile<Real>& tile, const TileScale<Real>& scale);
  /// Only tile.teacher, for accumulate_lse.
  void (*scale_one)(const Tile<Real>& tile, Real scale);
  /// Statistics of the rows of a tile.
  void (*accumulate_rows)(const Tile<Real>& tile, RowStatistics* rows);
  /// Statistics of the columns of a tile as rows of the symmetric relation. They have been started before.
  void (*accumulate_columns)(const Tile<Real>& tile, RowStatistics* columns);
  /// Only max_teacher and sum_teacher, from tile.teacher (already scaled); rows and, if not null, columns.
  void (*accumulate_lse)(const Tile<Real>& tile, RowStatistics* rows, RowStatistics* columns);
  /// Sums of an expectation over a tile; beta is the teacher's weight of the Jensen-Shannon mixture.
  void (*accumulate_expectation)(Expectation expectation,
                                 TileKind kind,
                                 Real beta,
                                 const Tile<Real>& tile,
                                 const RowReference<Real>& rows,
                                 const RowReference<Real>& columns);
  /// tile.teacher becomes H_ij = G_ij (+ G_ji); G's row sums without the diagonal go to rows.sum and columns.sum.
  void (*gradient)(Gradient gradient,
                   TileKind kind,
                   Real beta,
                   const Tile<Real>& tile,
                   const RowReference<Real>& rows,
                   const RowReference<Real>& columns);
};

/// The kernels of the instruction set that ATen has chosen for this process (ATEN_CPU_CAPABILITY is honoured).
template <typename Real>
const TileKernels<Real>& tile_kernels();

/// "avx512", "avx2" or "generic".
const char* instruction_set();

}  // namespace linearard::cpu
