#pragma once

#include <filesystem>
#include <functional>
#include <iosfwd>
#include <string>

namespace ard {

/// The contents of a text file; UserError if it cannot be read.
std::string read_text(const std::filesystem::path& path);

/// Write a file that appears under its name only when it is complete and on the disk: a process killed at any time, or
/// a full disk, leaves the old file or none.
void write_atomically(const std::filesystem::path& path, const std::function<void(std::ostream&)>& write);

}  // namespace ard
