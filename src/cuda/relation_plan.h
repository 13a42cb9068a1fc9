#pragma once

#include <linearard/plan.h>

#include "arguments.h"

namespace linearard::cuda {

ExecutionPlan relation_plan(const RelationArguments& arguments);

}  // namespace linearard::cuda
