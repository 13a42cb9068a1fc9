#include "files.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <system_error>

#include <fcntl.h>
#include <unistd.h>

#include "user_error.h"

namespace ard {
namespace {

void flush_to_disk(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY);
  const bool flushed = descriptor >= 0 && ::fsync(descriptor) == 0;
  const int reason = errno;
  if (descriptor >= 0) ::close(descriptor);
  if (!flushed) throw UserError("cannot write '" + path.string() + "': " + std::strerror(reason));
}

}  // namespace

std::string read_text(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  if (!std::filesystem::is_regular_file(path) || !(text << stream.rdbuf())) {
    throw UserError("cannot read the file '" + path.string() + "'");
  }
  return text.str();
}

void write_atomically(const std::filesystem::path& path, const std::function<void(std::ostream&)>& write) {
  std::filesystem::path staging = path;
  staging += ".incomplete";
  try {
    std::ofstream stream(staging, std::ios::binary | std::ios::trunc);
    write(stream);
    stream.close();
    if (!stream) throw UserError("cannot write '" + staging.string() + "': " + std::strerror(errno));
    flush_to_disk(staging);
    std::filesystem::rename(staging, path);
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove(staging, ignored);
    throw;
  }
}

}  // namespace ard
