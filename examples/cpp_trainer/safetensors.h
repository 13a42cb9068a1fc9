#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace ard {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;
using Metadata = std::map<std::string, std::string>;

/// A safetensors file: 8 bytes with the length of the header, a header in JSON, the tensors' bytes. Nothing in it is
/// executed. The constructor checks the whole header against the size of the file.
class SafetensorsFile {
 public:
  /// Throws UserError for a file that is missing, truncated or not safetensors.
  explicit SafetensorsFile(std::filesystem::path path);

  bool contains(const std::string& name) const { return entries_.count(name) != 0; }

  /// The tensor of that name, on the CPU, in the dtype of the file; UserError if there is none.
  at::Tensor tensor(const std::string& name) const;

  const Metadata& metadata() const { return metadata_; }

 private:
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    uint64_t offset;  // from the beginning of the file
  };

  void read_header(const std::string& header, uint64_t data_begin, uint64_t data_size);

  std::filesystem::path path_;
  std::map<std::string, Entry> entries_;
  Metadata metadata_;
};

/// Write tensors in their dtypes, atomically.
void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors, const Metadata& metadata);

}  // namespace ard
