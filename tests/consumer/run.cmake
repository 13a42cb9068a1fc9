# Builds foreign projects against an installed linearard, telling them nothing but CMAKE_PREFIX_PATH, and runs them.
#
# cmake -D prefix_path=... -D work_dir=... [-D generator=... -D make_program=... -D compiler=...] -P run.cmake
# With -D build_dir=..., the library of that build directory is installed into the prefix first.

file(REMOVE_RECURSE "${work_dir}")
file(MAKE_DIRECTORY "${work_dir}")

if(build_dir)
  file(REMOVE_RECURSE "${prefix_path}")
  execute_process(
    COMMAND "${CMAKE_COMMAND}" --install "${build_dir}" --prefix "${prefix_path}" --component library
    OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
endif()

set(tools "")
if(generator)
  list(APPEND tools -G "${generator}" -D "CMAKE_MAKE_PROGRAM=${make_program}" -D "CMAKE_CXX_COMPILER=${compiler}")
endif()

# The projects are copied: nothing beside them in the source tree can be found by accident.
function(configure name source prefix)
  file(COPY "${CMAKE_CURRENT_LIST_DIR}/${source}" DESTINATION "${work_dir}/source")
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -S "${work_dir}/source/${source}" -B "${work_dir}/${name}" ${tools}
      -D "CMAKE_PREFIX_PATH=${prefix}"
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE message)
  set(failed "${failed}" PARENT_SCOPE)
  set(message "${message}" PARENT_SCOPE)
endfunction()

foreach(project IN ITEMS plain undisturbed)
  configure(${project} ${project} "${prefix_path}")
  if(failed)
    message(FATAL_ERROR "${project} cannot be configured: ${message}")
  endif()
  execute_process(COMMAND "${CMAKE_COMMAND}" --build "${work_dir}/${project}" COMMAND_ERROR_IS_FATAL ANY)
  execute_process(COMMAND "${work_dir}/${project}/${project}" COMMAND_ERROR_IS_FATAL ANY)
endforeach()

# What does not fit is refused while the project is configured, in a sentence.
function(expect_refusal name prefix sentence)
  configure(${name} plain "${prefix}")
  string(REGEX REPLACE "[ \n]+" " " message "${message}")
  if(NOT failed OR NOT message MATCHES "${sentence}")
    message(FATAL_ERROR "${name}: expected a refusal with '${sentence}', got: ${message}")
  endif()
  message(STATUS "refused: ${name}")
endfunction()

# A torch of another minor version, as far as it is looked at.
set(other_torch "${work_dir}/torch-1.13")
file(WRITE "${other_torch}/include/ATen/ATen.h" "")
file(WRITE "${other_torch}/lib/libtorch_cpu.so" "")
file(WRITE "${other_torch}/include/torch/version.h"
     "#define TORCH_VERSION_MAJOR 1\n#define TORCH_VERSION_MINOR 13\n#define TORCH_VERSION_PATCH 1\n")
expect_refusal(another_torch "${other_torch};${prefix_path}"
               "linearard [0-9.]+ was built against torch [0-9.]+, but torch 1.13.1 was found in ")

file(GLOB_RECURSE config LIST_DIRECTORIES FALSE "${prefix_path}/linearardConfig.cmake")
cmake_path(GET config PARENT_PATH directory)
file(COPY "${directory}" DESTINATION "${work_dir}/incomplete/lib/cmake")
expect_refusal(missing_library "${work_dir}/incomplete" "this installation of linearard is incomplete: .* has no ")
