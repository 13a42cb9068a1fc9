// Attention-relation distillation (LinearARD) of a Llama model in C++: LibTorch, linearard and a JSON reader.

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include <c10/util/Exception.h>

#include "settings.h"
#include "trainer.h"
#include "user_error.h"

int main(int count, char** values) {
  try {
    bool help = false;
    const ard::Settings settings = ard::parse_settings(std::vector<std::string>(values + 1, values + count), help);
    if (help) {
      std::fputs(ard::help_text().c_str(), stdout);
      return 0;
    }
    ard::train(settings);
    return 0;
  } catch (const ard::UserError& error) {
    std::fprintf(stderr, "cpp_trainer: %s\n", error.what());
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "cpp_trainer: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cpp_trainer: %s\n", error.what());
  }
  return 1;
}
