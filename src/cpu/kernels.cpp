#include <string>

#include <ATen/Version.h>

#include "cpu/kernels/tile_kernels.h"

namespace linearard::cpu {

// One namespace for each instruction set that tile_kernels.cpp was compiled for.
#define LINEARARD_DECLARE_KERNELS(isa) \
  namespace isa {                      \
  template <typename Real>             \
  const TileKernels<Real>& kernels();  \
  }

LINEARARD_DECLARE_KERNELS(generic)
#ifdef LINEARARD_WITH_X86_KERNELS
LINEARARD_DECLARE_KERNELS(avx2)
LINEARARD_DECLARE_KERNELS(avx512)
#endif

namespace {

enum class InstructionSet { kGeneric, kAvx2, kAvx512 };

InstructionSet detect() {
#ifdef LINEARARD_WITH_X86_KERNELS
  // ATen has looked at the processor and at ATEN_CPU_CAPABILITY already.
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return InstructionSet::kAvx512;
  if (capability == "AVX2") return InstructionSet::kAvx2;
#endif
  return InstructionSet::kGeneric;
}

InstructionSet detected() {
  static const InstructionSet result = detect();
  return result;
}

}  // namespace

template <typename Real>
const TileKernels<Real>& tile_kernels() {
#ifdef LINEARARD_WITH_X86_KERNELS
  if (detected() == InstructionSet::kAvx512) return avx512::kernels<Real>();
  if (detected() == InstructionSet::kAvx2) return avx2::kernels<Real>();
#endif
  return generic::kernels<Real>();
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

const char* instruction_set() {
  switch (detected()) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kGeneric:
      break;
  }
  return "generic";
}

}  // namespace linearard::cpu
