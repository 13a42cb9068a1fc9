#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <fstream>
#include <optional>
#include <ostream>

#include <ATen/ops/empty.h>
#include <nlohmann/json.hpp>

#include "files.h"
#include "user_error.h"

namespace ard {
namespace {

// The format is little-endian, and tensors are copied as they lie in memory.
static_assert(std::endian::native == std::endian::little);

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kLargestHeader = 100'000'000;  // the limit of the reference implementation

const std::map<std::string, at::ScalarType>& dtypes() {
  static const std::map<std::string, at::ScalarType> table = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
      {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool},
  };
  return table;
}

const std::string& dtype_name(at::ScalarType dtype) {
  for (const auto& [name, known] : dtypes()) {
    if (known == dtype) return name;
  }
  throw UserError(std::string("safetensors files cannot hold tensors of dtype ") + at::toString(dtype));
}

// The number of bytes of a tensor, or nothing for a negative size or more bytes than can be counted.
std::optional<uint64_t> byte_count(const std::vector<int64_t>& shape, at::ScalarType dtype) {
  uint64_t bytes = at::elementSize(dtype);
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) return std::nullopt;
  }
  return bytes;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::filesystem::path path) : path_(std::move(path)) {
  const std::string file = "the safetensors file '" + path_.string() + "' ";
  std::ifstream stream(path_, std::ios::binary);
  if (!stream || !std::filesystem::is_regular_file(path_)) throw UserError(file + "cannot be opened");
  const uint64_t size = std::filesystem::file_size(path_);
  uint64_t length = 0;
  if (size < kLengthBytes || !stream.read(reinterpret_cast<char*>(&length), kLengthBytes)) {
    throw UserError(file + "is truncated: it has " + std::to_string(size) + " bytes, no header");
  }
  if (length > kLargestHeader) throw UserError(file + "is not a safetensors file: its header is impossibly long");
  if (length > size - kLengthBytes) {
    throw UserError(file + "is truncated: its header has " + std::to_string(length) + " bytes, the file " +
                    std::to_string(size));
  }
  std::string header(length, '\0');
  stream.read(header.data(), static_cast<std::streamsize>(length));
  read_header(header, kLengthBytes + length, size - kLengthBytes - length);
}

void SafetensorsFile::read_header(const std::string& header, uint64_t data_begin, uint64_t data_size) {
  const std::string file = "the safetensors file '" + path_.string() + "' ";
  const auto json = nlohmann::json::parse(header, nullptr, false);
  if (!json.is_object()) throw UserError(file + "is not a safetensors file: its header is not a JSON object");
  uint64_t needed = 0;
  try {
    for (const auto& [name, value] : json.items()) {
      if (name == "__metadata__") {
        metadata_ = value.get<Metadata>();
        continue;
      }
      const auto dtype = dtypes().find(value.at("dtype").get<std::string>());
      if (dtype == dtypes().end()) throw UserError(file + "has a tensor '" + name + "' of an unknown dtype");
      const auto shape = value.at("shape").get<std::vector<int64_t>>();
      const auto [begin, end] = value.at("data_offsets").get<std::pair<uint64_t, uint64_t>>();
      if (begin > end || byte_count(shape, dtype->second) != end - begin) {
        throw UserError(file + "contradicts itself: shape and bytes of the tensor '" + name + "' do not agree");
      }
      needed = std::max(needed, end);
      entries_[name] = {dtype->second, shape, data_begin + begin};
    }
  } catch (const nlohmann::json::exception&) {
    throw UserError(file + "is not a safetensors file: its header lacks a dtype, shape or data_offsets");
  }
  if (needed > data_size) {
    throw UserError(file + "is truncated: its tensors need " + std::to_string(needed) + " bytes, the file has " +
                    std::to_string(data_size));
  }
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto found = entries_.find(name);
  if (found == entries_.end()) {
    throw UserError("the safetensors file '" + path_.string() + "' has no tensor '" + name + "'");
  }
  const Entry& entry = found->second;
  at::Tensor result = at::empty(entry.shape, entry.dtype);
  std::ifstream stream(path_, std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(entry.offset));
  stream.read(static_cast<char*>(result.data_ptr()), static_cast<std::streamsize>(result.nbytes()));
  if (!stream) throw UserError("cannot read the safetensors file '" + path_.string() + "'");
  return result;
}

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors, const Metadata& metadata) {
  nlohmann::ordered_json header;
  header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", dtype_name(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + tensor.nbytes()}}};
    offset += tensor.nbytes();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the format's way to align the data
  write_atomically(path, [&](std::ostream& stream) {
    const uint64_t length = text.size();
    stream.write(reinterpret_cast<const char*>(&length), kLengthBytes);
    stream << text;
    for (const auto& [name, tensor] : tensors) {
      const at::Tensor bytes = tensor.detach().cpu().contiguous();
      stream.write(static_cast<const char*>(bytes.data_ptr()), static_cast<std::streamsize>(bytes.nbytes()));
    }
  });
}

}  // namespace ard
