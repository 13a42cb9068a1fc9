#include <linearard/plan.h>

#include "checks.h"
#include "cpu/relation.h"
#ifdef LINEARARD_WITH_CUDA
#include "cuda/relation_plan.h"
#endif

namespace linearard {

ExecutionPlan plan_relation_kl(const at::Tensor& student, const at::Tensor& teacher, const RelationOptions& options) {
  const RelationArguments arguments = check_relation("plan_relation_kl", student, teacher, options);
  if (arguments.cu_seqlens) {
    check_sequence_boundaries("plan_relation_kl", "cu_seqlens", *arguments.cu_seqlens, student.size(2));
  }
#ifdef LINEARARD_WITH_CUDA
  if (student.is_cuda()) return cuda::relation_plan(arguments);
#endif
  TORCH_CHECK(student.device().is_cpu(),
              "plan_relation_kl: student must be on a device with kernels of its own (the CPU, or CUDA in a build with "
              "nvcc), got ",
              student.device());
  return cpu::relation_plan(arguments);
}

}  // namespace linearard
