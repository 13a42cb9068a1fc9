# FindLibTorch: the C++ libraries of an installed torch.
#
# Why not find_package(Torch)? With a CUDA build of torch, which is what PyPI serves, it demands a CUDA toolkit even
# from projects that compile no CUDA code, and it rewrites the architecture flags of those that do. A machine without
# nvcc must build linearard, and the architectures are the project's own, so the libraries are imported directly.
# Both can be used side by side: the target names differ.
#
# Where it looks: LibTorch_ROOT, Torch_ROOT, Torch_DIR, CMAKE_PREFIX_PATH (torch's root, or the value of
# torch.utils.cmake_prefix_path), LibTorch_HINTS (set by an installed linearard: the torch beside it), and last the torch
# that the Python interpreter finds (Python_EXECUTABLE).
#
# Sets LibTorch_FOUND, LibTorch_VERSION, LibTorch_ROOT_DIR, LibTorch_LIBRARY_DIR and these imported targets:
#   LibTorch::LibTorch  headers, libtorch, libtorch_cpu, libc10
#   LibTorch::OpenMP    component OpenMP: the OpenMP runtime that torch uses, which at::parallel_for needs to be parallel
#   LibTorch::Python    libtorch_python, where it exists: for Python extension modules

set(_libtorch_candidates "")
foreach(_libtorch_variable IN ITEMS LibTorch_ROOT Torch_ROOT)
  if(DEFINED ${_libtorch_variable})
    list(APPEND _libtorch_candidates "${${_libtorch_variable}}")
  endif()
  if(DEFINED ENV{${_libtorch_variable}})
    list(APPEND _libtorch_candidates "$ENV{${_libtorch_variable}}")
  endif()
endforeach()
if(Torch_DIR)
  list(APPEND _libtorch_candidates "${Torch_DIR}/../../..")
endif()
foreach(_libtorch_prefix IN LISTS CMAKE_PREFIX_PATH)
  list(APPEND _libtorch_candidates "${_libtorch_prefix}" "${_libtorch_prefix}/../..")
endforeach()

list(APPEND _libtorch_candidates ${LibTorch_HINTS})

# Not cached, so that another interpreter or prefix takes effect at the next configuration.
set(LibTorch_ROOT_DIR "")
foreach(_libtorch_candidate IN LISTS _libtorch_candidates)
  if(EXISTS "${_libtorch_candidate}/include/ATen/ATen.h" AND EXISTS "${_libtorch_candidate}/lib/libtorch_cpu.so")
    get_filename_component(LibTorch_ROOT_DIR "${_libtorch_candidate}" ABSOLUTE)
    break()
  endif()
endforeach()

if(NOT LibTorch_ROOT_DIR)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
      OUTPUT_VARIABLE _libtorch_candidate ERROR_QUIET)
    if(_libtorch_candidate AND EXISTS "${_libtorch_candidate}/include/ATen/ATen.h")
      set(LibTorch_ROOT_DIR "${_libtorch_candidate}")
    endif()
  endif()
endif()

set(LibTorch_VERSION "")
if(LibTorch_ROOT_DIR)
  set(LibTorch_LIBRARY_DIR "${LibTorch_ROOT_DIR}/lib")
  foreach(_libtorch_header IN ITEMS
          torch/headeronly/version.h torch/version.h torch/csrc/api/include/torch/version.h)
    if(NOT LibTorch_VERSION AND EXISTS "${LibTorch_ROOT_DIR}/include/${_libtorch_header}")
      file(READ "${LibTorch_ROOT_DIR}/include/${_libtorch_header}" _libtorch_text)
      if(_libtorch_text MATCHES "TORCH_VERSION_MAJOR ([0-9]+).*TORCH_VERSION_MINOR ([0-9]+).*TORCH_VERSION_PATCH ([0-9]+)")
        set(LibTorch_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}")
      endif()
    endif()
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_ROOT_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE
    "torch was not found. Install it (pip install torch) for the interpreter that Python_EXECUTABLE names, or point CMAKE_PREFIX_PATH at what torch.utils.cmake_prefix_path says.")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  set_target_properties(LibTorch::LibTorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES
      "${LibTorch_ROOT_DIR}/include;${LibTorch_ROOT_DIR}/include/torch/csrc/api/include"
    INTERFACE_COMPILE_FEATURES cxx_std_17
    # libtorch.so defines no symbol that a program uses; it is kept because loading it registers the CUDA backend.
    INTERFACE_LINK_LIBRARIES
      "-Wl,--push-state,--no-as-needed,${LibTorch_LIBRARY_DIR}/libtorch.so,--pop-state;${LibTorch_LIBRARY_DIR}/libtorch_cpu.so;${LibTorch_LIBRARY_DIR}/libc10.so")

  if(EXISTS "${LibTorch_LIBRARY_DIR}/libtorch_python.so")
    add_library(LibTorch::Python INTERFACE IMPORTED)
    set_target_properties(LibTorch::Python PROPERTIES
      INTERFACE_LINK_LIBRARIES "LibTorch::LibTorch;${LibTorch_LIBRARY_DIR}/libtorch_python.so")
  endif()
endif()

# A second OpenMP runtime in the process would have its own thread pool: link the one that torch ships, when it does.
if(LibTorch_FOUND AND "OpenMP" IN_LIST LibTorch_FIND_COMPONENTS AND NOT TARGET LibTorch::OpenMP)
  add_library(LibTorch::OpenMP INTERFACE IMPORTED)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND EXISTS "${LibTorch_LIBRARY_DIR}/libgomp.so.1")
    set_target_properties(LibTorch::OpenMP PROPERTIES
      INTERFACE_COMPILE_OPTIONS "$<$<COMPILE_LANGUAGE:CXX>:-fopenmp>"
      INTERFACE_LINK_LIBRARIES "${LibTorch_LIBRARY_DIR}/libgomp.so.1")
  else()
    find_package(OpenMP REQUIRED COMPONENTS CXX)
    set_target_properties(LibTorch::OpenMP PROPERTIES INTERFACE_LINK_LIBRARIES OpenMP::OpenMP_CXX)
  endif()
endif()
