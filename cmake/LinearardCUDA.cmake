# Decides whether the CUDA part is built, and for which architectures. Sets LINEARARD_WITH_CUDA, enables the language
# and says in one line what was chosen.
#
# AUTO never makes a user wait for nvcc without a GPU to run the result on; packagers and CI say ON.

set(LINEARARD_WITH_CUDA OFF)

function(linearard_find_nvcc result)
  find_program(LINEARARD_NVCC nvcc
    HINTS "$ENV{CUDACXX}" "${CUDAToolkit_ROOT}/bin" "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin"
    PATHS /usr/local/cuda/bin)
  mark_as_advanced(LINEARARD_NVCC)
  if(CMAKE_CUDA_COMPILER)
    set(${result} "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
  elseif(LINEARARD_NVCC)
    set(${result} "${LINEARARD_NVCC}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

# Compute capabilities of the GPUs as architectures (9.0 -> 90a: wgmma and TMA exist in the "a" variant only).
function(linearard_detect_gpus result)
  set(architectures "")
  find_program(LINEARARD_NVIDIA_SMI nvidia-smi)
  mark_as_advanced(LINEARARD_NVIDIA_SMI)
  if(LINEARARD_NVIDIA_SMI)
    execute_process(COMMAND "${LINEARARD_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
                    RESULT_VARIABLE failed OUTPUT_VARIABLE capabilities ERROR_QUIET)
    if(NOT failed)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
      string(REPLACE "." "" architectures "${capabilities}")
      list(TRANSFORM architectures REPLACE "^90$" "90a")
      list(REMOVE_DUPLICATES architectures)
    endif()
  endif()
  # A container may have the device without nvidia-smi: let nvcc ask the driver.
  if(NOT architectures AND EXISTS /dev/nvidia0)
    set(architectures native)
  endif()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

if(LINEARARD_CUDA STREQUAL "AUTO")
  linearard_find_nvcc(linearard_nvcc)
  linearard_detect_gpus(linearard_gpus)
  if(linearard_nvcc AND linearard_gpus)
    set(LINEARARD_WITH_CUDA ON)
    set(linearard_architectures "${linearard_gpus}")
  elseif(linearard_nvcc)
    set(linearard_reason "no GPU found")
  elseif(linearard_gpus)
    set(linearard_reason "a GPU but no nvcc found")
  else()
    set(linearard_reason "neither nvcc nor a GPU found")
  endif()
elseif(LINEARARD_CUDA)
  linearard_find_nvcc(linearard_nvcc)
  if(NOT linearard_nvcc)
    message(FATAL_ERROR "LINEARARD_CUDA=ON needs nvcc, and none was found: install the CUDA toolkit, or set CUDACXX to "
                        "its nvcc, or use LINEARARD_CUDA=OFF")
  endif()
  set(LINEARARD_WITH_CUDA ON)
  set(linearard_architectures 80 90a)
else()
  set(linearard_reason "LINEARARD_CUDA=${LINEARARD_CUDA}")
endif()

if(LINEARARD_WITH_CUDA)
  if(LINEARARD_CUDA_ARCHITECTURES)
    set(linearard_architectures "${LINEARARD_CUDA_ARCHITECTURES}")
  endif()
  set(CMAKE_CUDA_COMPILER "${linearard_nvcc}")
  # Read while the language is enabled; the targets carry the same list.
  set(CMAKE_CUDA_ARCHITECTURES "${linearard_architectures}")
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  message(STATUS "linearard: CUDA: building with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${linearard_architectures} "
                 "(LINEARARD_CUDA=${LINEARARD_CUDA})")
else()
  message(STATUS "linearard: CUDA: not building the CUDA kernels: ${linearard_reason}")
endif()
