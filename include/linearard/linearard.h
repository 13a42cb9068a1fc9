#pragma once

/// Everything that linearard offers to C++ programs.

#include <linearard/attention_kl.h>
#include <linearard/layer_relation_kl.h>
#include <linearard/options.h>
#include <linearard/plan.h>
#include <linearard/relation_kl.h>
#include <linearard/version.h>
