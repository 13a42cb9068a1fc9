# Written by CMake (python/bindings/_build_config.py.in).
TORCH_VERSION: str
