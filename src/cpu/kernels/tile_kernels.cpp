#include "tile_kernels.h"

#include "vector_math.h"

#include <cmath>
#include <limits>

#include "forward_kernels.h"
#include "gradient_kernels.h"

// Compiled once per instruction set (LINEARARD_ISA); see tile_kernels.h.

namespace linearard::cpu::LINEARARD_ISA {

template <typename Real>
const TileKernels<Real>& kernels() {
  static constexpr TileKernels<Real> table{
      kLanes<Real>,
      &scale_tile<Real>,
      &scale_one<Real>,
      &accumulate_rows<Real>,
      &accumulate_columns<Real>,
      &accumulate_lse<Real>,
      &accumulate_expectation<Real>,
      &gradient<Real>,
  };
  return table;
}

template const TileKernels<float>& kernels<float>();
template const TileKernels<double>& kernels<double>();

}  // namespace linearard::cpu::LINEARARD_ISA
