// Compiles under the project's own standard and warnings, links and calls the library.

#include <ATen/ATen.h>
#include <linearard/linearard.h>

static_assert(__cplusplus == 201703L, "the language standard is the project's own");

int main() {
  const at::Tensor teacher = at::ones({1, 1, 3, 4});
  return linearard::relation_kl(teacher, teacher).item<double>() == 0.0 ? 0 : 1;
}
