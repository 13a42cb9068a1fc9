# Warnings of the project's own targets. An INTERFACE target, linked PRIVATE: it must never reach the users of the
# library. Torch's headers are SYSTEM headers (an imported target), so what they would warn about stays silent.
# They are errors where CMAKE_COMPILE_WARNING_AS_ERROR says so, as the presets do: a compiler that is newer than this
# code must not keep anybody from installing it.

add_library(linearard_warnings INTERFACE)
target_compile_options(linearard_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic>
  # nvcc's own host pass produces pedantic warnings about the code it generates.
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
