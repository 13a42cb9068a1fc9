#pragma once

#include "settings.h"

namespace ard {

/// Restore a model as the settings say: progress on standard output, checkpoints and OUTPUT_DIR/model on the disk.
/// Throws UserError before anything is written for input that cannot be used.
void train(const Settings& settings);

}  // namespace ard
