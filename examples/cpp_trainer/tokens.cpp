#include "tokens.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <string>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "user_error.h"

namespace ard {
namespace {

constexpr std::array<char, 8> kMagic = {'L', 'A', 'R', 'D', 'T', 'O', 'K', 'S'};
constexpr uint32_t kVersion = 1;

struct Header {
  std::array<char, 8> magic;
  uint32_t version;
  uint32_t bytes_per_id;
  uint64_t vocabulary_size;
  uint64_t sequences;
  uint64_t length;
};
static_assert(sizeof(Header) == 40);

// Everything about the header that can be wrong; `size` is the file's.
void check(const Header& header, const std::string& file, uint64_t size, uint64_t vocabulary_size) {
  if (header.magic != kMagic) throw UserError(file + " was not written by `linearard tokenize`");
  if (header.version != kVersion) {
    throw UserError(file + " has version " + std::to_string(header.version) + ", this program reads version " +
                    std::to_string(kVersion));
  }
  if (header.vocabulary_size != vocabulary_size) {
    throw UserError(file + " was made for a vocabulary of " + std::to_string(header.vocabulary_size) +
                    " tokens, the model has " + std::to_string(vocabulary_size));
  }
  if (header.bytes_per_id != 2 && header.bytes_per_id != 4) {
    throw UserError(file + " has ids of " + std::to_string(header.bytes_per_id) + " bytes, expected 2 or 4");
  }
  uint64_t bytes = header.bytes_per_id;
  if (header.sequences == 0 || header.length == 0 || __builtin_mul_overflow(bytes, header.sequences, &bytes) ||
      __builtin_mul_overflow(bytes, header.length, &bytes) || bytes != size - sizeof(Header)) {
    throw UserError(file + " is truncated: its header names " + std::to_string(header.sequences) + " sequences of " +
                    std::to_string(header.length) + " tokens, the file has " + std::to_string(size) + " bytes");
  }
}

}  // namespace

at::Tensor read_tokens(const std::filesystem::path& path, int64_t vocabulary_size) {
  const std::string file = "the token file '" + path.string() + "'";
  std::ifstream stream(path, std::ios::binary);
  if (!stream || !std::filesystem::is_regular_file(path)) throw UserError(file + " cannot be opened");
  Header header{};
  if (!stream.read(reinterpret_cast<char*>(&header), sizeof(header))) {
    throw UserError(file + " is truncated: it has no complete header");
  }
  check(header, file, std::filesystem::file_size(path), static_cast<uint64_t>(vocabulary_size));
  const auto shape = {static_cast<int64_t>(header.sequences), static_cast<int64_t>(header.length)};
  const at::Tensor raw = at::empty(shape, header.bytes_per_id == 2 ? at::kUInt16 : at::kInt);
  stream.read(static_cast<char*>(raw.data_ptr()), static_cast<std::streamsize>(raw.nbytes()));
  if (!stream) throw UserError(file + " cannot be read");
  at::Tensor ids = raw.to(at::kLong);
  const auto smallest = ids.min().item<int64_t>();
  const auto largest = ids.max().item<int64_t>();
  if (smallest < 0 || largest >= vocabulary_size) {
    throw UserError(file + " is damaged: it has the id " + std::to_string(smallest < 0 ? smallest : largest) +
                    " in a vocabulary of " + std::to_string(vocabulary_size) + " tokens");
  }
  return ids;
}

Sampler::Sampler(int64_t sequences, int64_t batch_size, uint64_t seed)
    : sequences_(sequences), batch_size_(batch_size), seed_(seed) {}

at::Tensor Sampler::batch(int64_t step) {
  const int64_t batches = (sequences_ + batch_size_ - 1) / batch_size_;
  const int64_t epoch = step / batches;
  if (epoch != epoch_) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed_ + static_cast<uint64_t>(epoch));
    order_ = at::randperm(sequences_, generator, at::kLong);
    epoch_ = epoch;
  }
  const int64_t begin = step % batches * batch_size_;
  return order_.slice(0, begin, std::min(begin + batch_size_, sequences_));
}

}  // namespace ard
