#include <utility>
#include <vector>

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "aten/divergence.h"
#include "backends.h"
#include "kernel_scope.h"
#include "row_sets.h"
#include "saturation.h"

// Registered for every device that has no kernels of its own.

namespace linearard {
namespace {

using aten::Gradients;
using aten::RowValues;
using aten::Vectors;
using aten::Visibility;

/// The heads of one sequence, [G, rows, ...] out of [B, H, N, ...].
at::Tensor heads_of(const at::Tensor& tensor, const RowSet& rows) {
  return take_rows(tensor.select(0, rows.batch), rows, 1);
}

void write_heads(const at::Tensor& tensor, const RowSet& rows, const at::Tensor& values) {
  put_rows(tensor.select(0, rows.batch), rows, saturating_cast(values, tensor.scalar_type()), 1);
}

Visibility visibility_of(const RowSet& rows, const RowSet& keys, bool causal, bool relation, const at::Device& device) {
  if (!causal) return {{}, relation};
  return {at::tensor(visible_keys(rows, keys, true), at::kLong).to(device), relation};
}

ThreeTensors empty_statistics(const at::Tensor& rows_of, at::ScalarType dtype) {
  const auto zeros = [&] { return at::zeros(rows_of.sizes().slice(0, 3), rows_of.options().dtype(dtype)); };
  return {zeros(), zeros(), zeros()};
}

void write_values(const ThreeTensors& results, const RowSet& rows, const RowValues& values, bool exchanged) {
  write_heads(std::get<0>(results), rows, values.kl);
  write_heads(std::get<1>(results), rows, exchanged ? values.lse_teacher : values.lse_student);
  write_heads(std::get<2>(results), rows, exchanged ? values.lse_student : values.lse_teacher);
}

/// The forward's statistics; computed again where float cannot hold them.
RowValues statistics_of(const LogitForm& form,
                        const at::Tensor& lse_student,
                        const at::Tensor& lse_teacher,
                        const RowSet& rows,
                        const Vectors& row_vectors,
                        const Vectors& key_vectors,
                        const Visibility& visibility) {
  if (form.wide) {
    return aten::divergence_forward(form, {}, row_vectors, key_vectors, visibility);
  }
  return {{}, heads_of(lse_student, rows).to(form.compute), heads_of(lse_teacher, rows).to(form.compute)};
}

/// The gradient out of the sum of H X of packed vectors.
at::Tensor finished(const LogitForm& form, const at::Tensor& sum, double scale_student) {
  return sum.mul(form.gradient_scale(scale_student)).div_(form.gradient_multiplier);
}

/// Each key head once for every query head that shares it.
at::Tensor repeat_heads(const at::Tensor& keys, int64_t heads) {
  return keys.size(0) == heads ? keys : keys.repeat_interleave(heads / keys.size(0), 0);
}

/// Without masks and packed sequences all batch entries are one batch of heads: fewer, larger operations.
RelationArguments fold_batch(const RelationArguments& given) {
  RelationArguments folded = given;
  if (given.key_padding_mask || given.cu_seqlens) return folded;
  folded.student = given.student.flatten(0, 1).unsqueeze(0);
  folded.teacher = given.teacher.flatten(0, 1).unsqueeze(0);
  return folded;
}

std::vector<RowSet> row_sets_of(const RelationArguments& arguments) {
  return row_sets(arguments.student.size(0), arguments.student.size(2), arguments.key_padding_mask,
                  arguments.cu_seqlens);
}

struct AtenBackend {
  static constexpr bool kHasValues = true;

  static ThreeTensors relation_forward(const RelationArguments& given) {
    const KernelScope scope;
    RelationArguments arguments = fold_batch(given);
    // KL(Q || P) is KL(P || Q) with the roles exchanged.
    const bool exchanged = arguments.divergence == Divergence::kReverseKL;
    if (exchanged) {
      std::swap(arguments.student, arguments.teacher);
      std::swap(arguments.scale_student, arguments.scale_teacher);
    }
    const LogitForm form = choose_logit_form(arguments, nullptr);
    const ThreeTensors results = empty_statistics(arguments.student, statistics_dtype(given));
    for (const RowSet& rows : row_sets_of(arguments)) {
      if (rows.length == 0) continue;
      const Vectors vectors =
          aten::pack_vectors(heads_of(arguments.student, rows), heads_of(arguments.teacher, rows), form);
      const Visibility visibility = visibility_of(rows, rows, given.causal, true, given.student.device());
      write_values(results, rows,
                   aten::divergence_forward(form, {given.divergence, given.beta}, vectors, vectors, visibility),
                   exchanged);
    }
    const auto shape = given.student.sizes().slice(0, 3);
    return {std::get<0>(results).view(shape), std::get<1>(results).view(shape), std::get<2>(results).view(shape)};
  }

  static at::Tensor relation_backward(const at::Tensor& grad_kl,
                                      const at::Tensor& lse_student,
                                      const at::Tensor& lse_teacher,
                                      const RelationArguments& given) {
    const KernelScope scope;
    const RelationArguments arguments = fold_batch(given);
    const LogitForm form = choose_logit_form(arguments, &grad_kl);
    const auto shape = arguments.student.sizes().slice(0, 3);
    at::Tensor grad_student = at::zeros(arguments.student.sizes(), arguments.student.options());
    for (const RowSet& rows : row_sets_of(arguments)) {
      if (rows.length == 0) continue;
      const Vectors vectors =
          aten::pack_vectors(heads_of(arguments.student, rows), heads_of(arguments.teacher, rows), form);
      const Visibility visibility = visibility_of(rows, rows, arguments.causal, true, arguments.student.device());
      const RowValues statistics = statistics_of(form, lse_student.reshape(shape), lse_teacher.reshape(shape), rows,
                                                 vectors, vectors, visibility);
      const Gradients gradients =
          aten::divergence_backward(form, {arguments.divergence, arguments.beta}, vectors, vectors, visibility,
                                    statistics, heads_of(grad_kl.reshape(shape), rows).to(form.compute));
      write_heads(grad_student, rows, finished(form, gradients.rows.add(gradients.keys), arguments.scale_student));
    }
    return grad_student.view(given.student.sizes());
  }

  static at::Tensor relation_lse(const RelationArguments& arguments) {
    const KernelScope scope;
    const LogitForm form = choose_logit_form(arguments, nullptr);
    at::Tensor lse = at::zeros(arguments.teacher.sizes().slice(0, 3),
                               arguments.teacher.options().dtype(statistics_dtype(arguments)));
    for (const RowSet& rows : row_sets_of(arguments)) {
      if (rows.length == 0) continue;
      const at::Tensor x = heads_of(arguments.teacher, rows);
      const Visibility visibility = visibility_of(rows, rows, arguments.causal, true, x.device());
      write_heads(lse, rows, aten::lse_forward(form, aten::pack_vectors(x, x, form), visibility));
    }
    return lse;
  }

  static ThreeTensors attention_forward(const AttentionArguments& given) {
    const KernelScope scope;
    AttentionArguments arguments = given;
    const bool exchanged = arguments.divergence == Divergence::kReverseKL;
    if (exchanged) {
      std::swap(arguments.query_student, arguments.query_teacher);
      std::swap(arguments.key_student, arguments.key_teacher);
      std::swap(arguments.scale_student, arguments.scale_teacher);
    }
    const LogitForm form = choose_logit_form(arguments, nullptr);
    const ThreeTensors results = empty_statistics(given.query_student, statistics_dtype(given));
    for_each_sequence(arguments, form,
                      [&](const RowSet& queries, const RowSet&, const Vectors& query_vectors,
                          const Vectors& key_vectors, const Visibility& visibility) {
                        write_values(results, queries,
                                     aten::divergence_forward(form, {given.divergence, given.beta}, query_vectors,
                                                              key_vectors, visibility),
                                     exchanged);
                      });
    return results;
  }

  static TwoTensors attention_backward(const at::Tensor& grad_kl,
                                       const at::Tensor& lse_student,
                                       const at::Tensor& lse_teacher,
                                       const AttentionArguments& arguments) {
    const KernelScope scope;
    const LogitForm form = choose_logit_form(arguments, &grad_kl);
    const int64_t query_heads = arguments.query_student.size(1);
    at::Tensor grad_query = at::zeros(arguments.query_student.sizes(), arguments.query_student.options());
    at::Tensor grad_key = at::zeros(arguments.key_student.sizes(), arguments.key_student.options());
    for_each_sequence(arguments, form,
                      [&](const RowSet& queries, const RowSet& keys, const Vectors& query_vectors,
                          const Vectors& key_vectors, const Visibility& visibility) {
                        const RowValues statistics = statistics_of(form, lse_student, lse_teacher, queries,
                                                                   query_vectors, key_vectors, visibility);
                        const Gradients gradients = aten::divergence_backward(
                            form, {arguments.divergence, arguments.beta}, query_vectors, key_vectors, visibility,
                            statistics, heads_of(grad_kl, queries).to(form.compute));
                        write_heads(grad_query, queries, finished(form, gradients.rows, arguments.scale_student));
                        const at::Tensor shared =
                            gradients.keys.unflatten(0, {grad_key.size(1), query_heads / grad_key.size(1)}).sum(1);
                        write_heads(grad_key, keys, finished(form, shared, arguments.scale_student));
                      });
    return {grad_query, grad_key};
  }

 private:
  template <typename Visit>
  static void for_each_sequence(const AttentionArguments& arguments, const LogitForm& form, const Visit& visit) {
    const at::Tensor& query = arguments.query_student;
    const auto query_sets = row_sets(query.size(0), query.size(2), arguments.query_padding_mask, arguments.cu_seqlens);
    const auto key_sets =
        row_sets(query.size(0), arguments.key_student.size(2), arguments.key_padding_mask, arguments.cu_seqlens_key);
    for (size_t i = 0; i < query_sets.size(); ++i) {
      const RowSet& queries = query_sets[i];
      const RowSet& keys = key_sets[i];
      if (queries.length == 0 || keys.length == 0 || query.size(1) == 0) continue;
      visit(queries, keys,
            aten::pack_vectors(heads_of(query, queries), heads_of(arguments.query_teacher, queries), form),
            aten::pack_vectors(repeat_heads(heads_of(arguments.key_student, keys), query.size(1)),
                               repeat_heads(heads_of(arguments.key_teacher, keys), query.size(1)), form),
            visibility_of(queries, keys, arguments.causal, false, query.device()));
    }
  }
};

}  // namespace
}  // namespace linearard

TORCH_LIBRARY_IMPL(linearard, CompositeExplicitAutograd, m) {
  linearard::Kernels<linearard::AtenBackend>::register_in(m);
}
