# Options, the default build type and the language standard.

# A wheel or an editable installation builds what Python needs; a developer's tree builds the tests as well when asked.
option(LINEARARD_BUILD_PYTHON "Build the Python module linearard._C" ${PROJECT_IS_TOP_LEVEL})
option(LINEARARD_BUILD_TESTS "Build the C++ tests (needs GoogleTest)" OFF)
option(LINEARARD_BUILD_BENCHMARKS "Build the C++ benchmarks (needs Google Benchmark)" OFF)
set(LINEARARD_SANITIZE "" CACHE STRING "Sanitizers to compile with, for example address;undefined")
set(LINEARARD_CUDA AUTO CACHE STRING "AUTO: where nvcc and a GPU are found, for that GPU. ON: required. OFF: never.")
set_property(CACHE LINEARARD_CUDA PROPERTY STRINGS AUTO ON OFF)
set(LINEARARD_CUDA_ARCHITECTURES "" CACHE STRING
    "Architectures of the CUDA kernels; empty: the GPU found (AUTO) or 80;90a (ON)")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# The shared library links static parts (tile kernels, CUDA).
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

include(GNUInstallDirs)
if(SKBUILD)
  # Inside a wheel everything lies in the Python package, next to the torch package.
  set(LINEARARD_INSTALL_LIBDIR linearard/lib)
  set(LINEARARD_INSTALL_INCLUDEDIR linearard/include)
  set(LINEARARD_INSTALL_RPATH "$ORIGIN/../../torch/lib")
else()
  set(LINEARARD_INSTALL_LIBDIR "${CMAKE_INSTALL_LIBDIR}")
  set(LINEARARD_INSTALL_INCLUDEDIR "${CMAKE_INSTALL_INCLUDEDIR}")
  set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "linearard needs a C++20 compiler: GCC 11 or newer, found ${CMAKE_CXX_COMPILER_VERSION}")
endif()

find_program(LINEARARD_CCACHE ccache)
mark_as_advanced(LINEARARD_CCACHE)
if(LINEARARD_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # What ccache's manual asks for so that files with a precompiled header are cached: these two, and -fpch-preprocess.
  set(CMAKE_CXX_COMPILER_LAUNCHER
      "${CMAKE_COMMAND};-E;env;CCACHE_SLOPPINESS=pch_defines,time_macros;${LINEARARD_CCACHE}")
  set(CMAKE_CUDA_COMPILER_LAUNCHER "${LINEARARD_CCACHE}")
endif()
