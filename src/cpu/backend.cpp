#include <torch/library.h>

#include "backends.h"
#include "cpu/attention.h"
#include "cpu/relation.h"

namespace linearard {
namespace {

struct CpuBackend {
  static constexpr bool kHasValues = true;
  static ThreeTensors relation_forward(const RelationArguments& arguments) { return cpu::relation_forward(arguments); }
  static at::Tensor relation_backward(const at::Tensor& grad_kl,
                                      const at::Tensor& lse_student,
                                      const at::Tensor& lse_teacher,
                                      const RelationArguments& arguments) {
    return cpu::relation_backward(grad_kl, lse_student, lse_teacher, arguments);
  }
  static at::Tensor relation_lse(const RelationArguments& arguments) { return cpu::relation_lse(arguments); }
  static ThreeTensors attention_forward(const AttentionArguments& arguments) {
    return cpu::attention_forward(arguments);
  }
  static TwoTensors attention_backward(const at::Tensor& grad_kl,
                                       const at::Tensor& lse_student,
                                       const at::Tensor& lse_teacher,
                                       const AttentionArguments& arguments) {
    return cpu::attention_backward(grad_kl, lse_student, lse_teacher, arguments);
  }
};

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CPU, m) { linearard::Kernels<linearard::CpuBackend>::register_in(m); }
