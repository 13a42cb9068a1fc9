#pragma once

#include <filesystem>
#include <string>

#include <torch/optim.h>
#include <nlohmann/json.hpp>

#include "safetensors.h"

namespace ard {

/// The file of a step in the directory of a run.
std::filesystem::path checkpoint_path(const std::filesystem::path& directory, int64_t step);

/// Write the trained parameters, AdamW's moments, the step and the settings of a run as one safetensors file,
/// atomically.
void save_checkpoint(const std::filesystem::path& path,
                     const NamedTensors& parameters,
                     torch::optim::AdamW& optimizer,
                     int64_t step,
                     const nlohmann::json& settings);

/// Restore parameters and optimizer in place and return the number of finished steps. UserError, before anything is
/// changed, for a damaged file or one that was written with other settings.
int64_t load_checkpoint(const std::filesystem::path& path,
                        const NamedTensors& parameters,
                        torch::optim::AdamW& optimizer,
                        const nlohmann::json& settings);

/// The newest checkpoint of a run; UserError if it has none.
std::filesystem::path last_checkpoint(const std::filesystem::path& directory);

/// Remove all but the newest `limit` checkpoints.
void remove_old_checkpoints(const std::filesystem::path& directory, int64_t limit);

}  // namespace ard
