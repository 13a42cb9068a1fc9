# Warnings of the project's own targets. An INTERFACE target, linked PRIVATE: it must never reach the users of the
# library. Torch's headers are SYSTEM headers (an imported target), so what they would warn about stays silent.

add_library(linearard_warnings INTERFACE)
target_compile_options(linearard_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Werror>
  # nvcc's own host pass produces pedantic warnings about the code it generates.
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;-Werror=all-warnings>)
