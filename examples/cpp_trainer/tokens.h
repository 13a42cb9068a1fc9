#pragma once

#include <cstdint>
#include <filesystem>

#include <ATen/core/Tensor.h>

namespace ard {

/// Read the file that `linearard tokenize` writes: training sequences [number, length] of token ids (int64).
///
/// Layout, little-endian: 8 bytes magic "LARDTOKS", uint32 version (1), uint32 bytes of a token id (2 or 4), uint64
/// vocabulary size, uint64 number of sequences, uint64 tokens of a sequence; then the ids, row by row.
/// Throws UserError for another kind of file, a truncated one, or one made for a vocabulary of another size.
at::Tensor read_tokens(const std::filesystem::path& path, int64_t vocabulary_size);

/// Which sequences each optimizer step reads: every epoch another permutation, the same as with transformers' Trainer
/// (accelerate's SeedableRandomSampler) for the same seed. It depends on the step alone, so resuming needs no state.
class Sampler {
 public:
  Sampler(int64_t sequences, int64_t batch_size, uint64_t seed);

  /// Indices [batch] (int64) of step 0, 1, ...; the last batch of an epoch may be smaller.
  at::Tensor batch(int64_t step);

 private:
  int64_t sequences_;
  int64_t batch_size_;
  uint64_t seed_;
  int64_t epoch_ = -1;
  at::Tensor order_;
};

}  // namespace ard
