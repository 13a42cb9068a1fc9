#pragma once

#include <stdexcept>

namespace ard {

/// Something the user gave cannot be used; the message is one sentence that says what was expected and what came.
class UserError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace ard
