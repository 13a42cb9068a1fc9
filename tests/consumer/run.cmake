# Installs the library into an empty prefix, then configures, builds and runs the consumer against that prefix.
#
# cmake -D build_dir=... -D libdir=... -D torch_root=... -D generator=... -D make_program=... -D compiler=... -P run.cmake

set(work_dir "${build_dir}/consumer")
set(prefix "${work_dir}/prefix")
file(REMOVE_RECURSE "${work_dir}")

execute_process(
  COMMAND "${CMAKE_COMMAND}" --install "${build_dir}" --prefix "${prefix}" --component library
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
execute_process(
  COMMAND "${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${work_dir}/build" -G "${generator}"
    -D "CMAKE_MAKE_PROGRAM=${make_program}"
    -D "CMAKE_CXX_COMPILER=${compiler}"
    -D "linearard_DIR=${prefix}/${libdir}/cmake/linearard"
    -D "CMAKE_PREFIX_PATH=${torch_root}"
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${CMAKE_COMMAND}" --build "${work_dir}/build" COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND "${work_dir}/build/consumer" COMMAND_ERROR_IS_FATAL ANY)
