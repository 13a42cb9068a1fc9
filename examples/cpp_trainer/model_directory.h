#pragma once

#include <filesystem>

#include "llama.h"

namespace ard {

/// Copy the weights of DIRECTORY/model.safetensors, or of the files that model.safetensors.index.json names, into
/// `model`. UserError for a tensor that is missing or of another shape than the configuration says.
void load_weights(Llama& model, const std::filesystem::path& directory);

/// Write a directory that transformers loads: weights (float32), configuration, and the tokenizer of `source`. It
/// appears under its name only when it is complete.
void save_model(const Llama& model,
                const ModelConfig& config,
                const std::filesystem::path& source,
                const std::filesystem::path& target);

}  // namespace ard
