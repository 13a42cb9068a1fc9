#pragma once

#include <functional>
#include <vector>

#include "cpu/operand.h"
#include "cpu/statistics.h"

namespace linearard::cpu {

/// Computes the divergence of the rows again whose result `cancels` (student and teacher differ by a nearly constant
/// shift of the logits that the row's first tile did not show): with both log-sum-exps known, the sum of phi is exact.
/// @param visible number of leading keys that a row sees
void refine_rows(const LogitForm& form,
                 const Operand& rows,
                 const Operand& keys,
                 const std::function<int64_t(int64_t)>& visible,
                 std::vector<RowResult>& results);

/// Upper bound on the memory that it takes, whatever the results are.
int64_t refine_bytes(const LogitForm& form, int64_t rows, int64_t keys, int64_t dimension);

}  // namespace linearard::cpu
