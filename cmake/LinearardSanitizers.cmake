# LINEARARD_SANITIZE as an INTERFACE target. Executables get the flags as well, so that the runtime comes first in the
# process; torch itself is not instrumented, which both sanitizers tolerate.

add_library(linearard_sanitizers INTERFACE)
if(LINEARARD_SANITIZE)
  list(JOIN LINEARARD_SANITIZE "," linearard_sanitizer_list)
  set(linearard_sanitizer_flags "-fsanitize=${linearard_sanitizer_list}" -fno-omit-frame-pointer)
  if("undefined" IN_LIST LINEARARD_SANITIZE)
    # A finding ends the test; vptr needs type information of torch's classes that its libraries do not export.
    list(APPEND linearard_sanitizer_flags -fno-sanitize-recover=all -fno-sanitize=vptr)
  endif()
  # What the instrumentation adds makes GCC see uses of uninitialised memory where there are none.
  target_compile_options(linearard_sanitizers INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:${linearard_sanitizer_flags};-Wno-maybe-uninitialized>)
  target_link_options(linearard_sanitizers INTERFACE ${linearard_sanitizer_flags})
  message(STATUS "linearard: sanitizers: ${linearard_sanitizer_list}")
endif()
