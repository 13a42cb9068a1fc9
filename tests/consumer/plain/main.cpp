// Compares relation_kl and its gradient with the n x n computation that it replaces, in float64.

#include <cmath>
#include <cstdio>

#include <ATen/ATen.h>
#include <linearard/linearard.h>

namespace {

at::Tensor log_relation(const at::Tensor& x) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(x.size(-1)));
  return at::log_softmax(at::matmul(x, x.transpose(-2, -1)) * scale, -1);
}

at::Tensor relation_kl_n_by_n(const at::Tensor& student, const at::Tensor& teacher) {
  const at::Tensor log_student = log_relation(student);
  const at::Tensor log_teacher = log_relation(teacher);
  return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean();
}

at::Tensor gradient(const at::Tensor& loss, const at::Tensor& student) {
  loss.backward();
  at::Tensor result = student.grad().clone();
  student.mutable_grad().reset();
  return result;
}

bool agrees(const char* name, const at::Tensor& actual, const at::Tensor& expected) {
  const double error = ((actual - expected).norm() / expected.norm()).item<double>();
  std::printf("%s: relative difference to the n x n computation %.1e\n", name, error);
  return error < 1e-9;  // the library's bound for float64
}

}  // namespace

int main() {
  at::manual_seed(1);
  const at::Tensor teacher = at::randn({2, 3, 50, 16}, at::kDouble);
  const at::Tensor student = (teacher + 0.1 * at::randn({2, 3, 50, 16}, at::kDouble)).requires_grad_();

  const at::Tensor loss = linearard::relation_kl(student, teacher);
  const at::Tensor expected = relation_kl_n_by_n(student, teacher);

  const bool value_agrees = agrees("value", loss.detach(), expected.detach());
  const bool gradient_agrees = agrees("gradient", gradient(loss, student), gradient(expected, student));
  std::printf("linearard %s\n", LINEARARD_VERSION);
  return value_agrees && gradient_agrees ? 0 : 1;
}
