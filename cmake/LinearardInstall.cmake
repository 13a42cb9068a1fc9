# Installation: headers, library and CMake package, the same layout in a prefix and inside the wheel, where everything
# lies in the Python package (linearard/include, linearard/lib). A wheel holds the components python and library.

include(CMakePackageConfigHelpers)

set(linearard_cmake_dir "${LINEARARD_INSTALL_LIBDIR}/cmake/linearard")

install(TARGETS linearard EXPORT linearardTargets
        LIBRARY DESTINATION "${LINEARARD_INSTALL_LIBDIR}" COMPONENT library
        INCLUDES DESTINATION "${LINEARARD_INSTALL_INCLUDEDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/linearard" "${PROJECT_BINARY_DIR}/include/linearard"
        DESTINATION "${LINEARARD_INSTALL_INCLUDEDIR}" COMPONENT library
        FILES_MATCHING PATTERN "*.h")
install(EXPORT linearardTargets NAMESPACE linearard:: DESTINATION "${linearard_cmake_dir}" COMPONENT library)

# Where the package looks for torch unless it is told: beside the Python package, or where this build found it.
if(SKBUILD)
  set(LINEARARD_TORCH_HINT "\${PACKAGE_PREFIX_DIR}/torch")
else()
  set(LINEARARD_TORCH_HINT "${LibTorch_ROOT_DIR}")
endif()
set(LINEARARD_LIBRARY_NAME "${CMAKE_SHARED_LIBRARY_PREFIX}linearard${CMAKE_SHARED_LIBRARY_SUFFIX}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" LINEARARD_TORCH_MINOR "${LibTorch_VERSION}")
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/linearardConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/linearardConfig.cmake" INSTALL_DESTINATION "${linearard_cmake_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/linearardConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/linearardConfig.cmake" "${PROJECT_BINARY_DIR}/linearardConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindLibTorch.cmake"
        DESTINATION "${linearard_cmake_dir}" COMPONENT library)
