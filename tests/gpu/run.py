"""Everything that is tested on a GPU: build for it, run the suites, write benchmarks/results/gpu-tests-<gpu>.txt.

    make test-gpu                          # in .venv
    make test-gpu PYTHON=/path/to/python   # in an environment that has torch, pybind11 and pytest; nothing is installed

Needs nvcc, CMake and GoogleTest; compute-sanitizer of the CUDA toolkit for the suites that are named after its tools.
With --suites only those run, and their lines replace the ones in a file of the same commit and machine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda-test"
PACKAGE = BUILD / "package"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The same on other kernels than those that the GPU would run: LINEARARD_TRIANGULAR (docs/performance.md).
VARIANTS = {"-portable": "portable", "-dense": "0"}
SUITES = (
    "googletest",
    "pytest",
    *SANITIZERS,
    "pytest-portable",
    *(suite + "-portable" for suite in SANITIZERS),
    "pytest-dense",
)
# The line in which a suite says how it ended: the last one that matches.
CLOSING = {
    "googletest": re.compile(r"^.*tests passed.*$", re.MULTILINE),
    "pytest": re.compile(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error).*?)(?: =+)?$", re.MULTILINE),
    **dict.fromkeys(SANITIZERS, re.compile(r"^=+ ((?:\w+ )?SUMMARY: .*)$", re.MULTILINE)),
}
# An editable installation of the package would be found before PYTHONPATH.
SITECUSTOMIZE = """import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


class Failure(Exception):
    """One sentence for the user."""


def output(command: list[str], **options) -> str:
    """What a program prints; Failure where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout.strip()
    except FileNotFoundError:
        raise Failure(f"{command[0]} was not found") from None
    except subprocess.CalledProcessError as error:
        last = next(iter(reversed(error.stderr.strip().splitlines())), "no message")
        raise Failure(f"{' '.join(command[:3])} ...: {last}") from None


def environment() -> dict[str, str]:
    """Programs of a virtual environment first (cmake, ninja), and the package that was built here."""
    own = [str(Path(sys.executable).parent)] if sys.prefix != sys.base_prefix else []
    path = os.pathsep.join([*own, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE)}


def build(jobs: int) -> None:
    """The library, the Python module and the C++ tests for the GPU present; the package put together in build/."""
    if shutil.which("nvcc", path=environment()["PATH"]) is None:
        raise Failure("nvcc was not found: install the CUDA toolkit, or put its bin directory into PATH")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=environment()["PATH"]) else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), *generator, f"-DPython_EXECUTABLE={sys.executable}"]
    # SKBUILD: the layout of a wheel.
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD=ON", "-DLINEARARD_BUILD_TESTS=ON", "-DLINEARARD_CUDA=AUTO"]
    commands = [configure, ["cmake", "--build", str(BUILD), "--parallel", str(jobs)]]
    commands += [
        ["cmake", "--install", str(BUILD), "--prefix", str(PACKAGE), "--component", component]
        for component in ("python", "library")
    ]
    for command in commands:
        print("+", " ".join(command), flush=True)
        try:
            done = subprocess.run(command, env=environment(), check=False)
        except FileNotFoundError:
            raise Failure(f"{command[0]} was not found") from None
        if done.returncode:
            raise Failure("the build failed, see above")
    for source in (ROOT / "python" / "linearard").iterdir():
        link = PACKAGE / "linearard" / source.name
        if not link.exists() and source.name != "__pycache__":
            link.symlink_to(source)
    (PACKAGE / "sitecustomize.py").write_text(SITECUSTOMIZE)


def context(commit: str | None) -> dict[str, str]:
    """What a result needs beside it; Failure where the build cannot serve this GPU."""
    script = (
        "import json, platform, torch, linearard; from linearard import _C; print(json.dumps([_C.__file__, "
        "_C.build_info(), platform.python_version(), torch.__version__, "
        "torch.cuda.get_device_name() if torch.cuda.is_available() else None]))"
    )
    line = output([sys.executable, "-c", script], env=environment()).splitlines()[-1]
    module, info, python, torch_version, gpu = json.loads(line)
    if not Path(module).is_relative_to(PACKAGE):
        raise Failure(f"another installation of linearard is in the way: {module}")
    if gpu is None:
        raise Failure("torch finds no GPU that it can use")
    if not info["cuda"]["architectures"]:
        raise Failure("the build has no CUDA kernels: see the line 'linearard: CUDA:' of the configuration above")
    return {
        "GPU": gpu,
        "driver": driver(),
        "CUDA toolkit": f"{info['cuda']['toolkit']}, architectures {' '.join(info['cuda']['architectures'])}",
        "compiler": info["compiler"],
        "Python": python,
        "torch": torch_version,
        "linearard": info["version"],
        "commit": commit or head(),
    }


def driver() -> str:
    """Version of the GPU's driver; unknown in a container without nvidia-smi."""
    try:
        return output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()[0]
    except Failure:
        return "unknown"


def head() -> str:
    """The commit of the working tree, with -dirty when anything but results differs from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = output([*git, "rev-parse", "--short=12", "HEAD"])
        changed = output([*git, "status", "--porcelain", "--", ":/", ":!/benchmarks/results"])
    except Failure:
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def tool_of(suite: str) -> str:
    """What a suite runs, whatever kernels it is about."""
    return suite.partition("-")[0]


def command_of(suite: str) -> list[str]:
    """The program that runs a suite."""
    suite = tool_of(suite)
    if suite == "googletest":
        return ["ctest", "--test-dir", str(BUILD), "--parallel", "8", "--output-on-failure", "--no-tests=error"]
    if suite == "pytest":
        parallel = ["-n", str(min(os.cpu_count() or 1, 16))] if importlib.util.find_spec("xdist") else []
        return [sys.executable, "-m", "pytest", "-q", *parallel, str(ROOT / "tests" / "python")]
    # The other tools need to know our kernels only; initcheck must see who else writes into memory.
    ours = [] if suite == "initcheck" else ["--kernel-regex", "kns=linearard"]
    case = [sys.executable, str(ROOT / "tests" / "gpu" / "sanitize_case.py")]
    return ["compute-sanitizer", "--tool", suite, "--error-exitcode", "1", *ours, *case]


def run(suite: str) -> tuple[str, bool]:
    """Its closing line, and whether it passed; its output goes to the terminal and into build/cuda-test."""
    command = command_of(suite)
    print("+", " ".join(command), flush=True)
    # Every tensor in an allocation of its own: the sanitizers see what leaves it.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool_of(suite) in SANITIZERS else {}
    for suffix, kernels in VARIANTS.items():
        if suite.endswith(suffix):
            extra["LINEARARD_TRIANGULAR"] = kernels
    lines = []
    try:
        with subprocess.Popen(
            command,
            env={**environment(), **extra},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
    except FileNotFoundError:
        return f"not run: {command[0]} was not found", False
    text = "".join(lines)
    (BUILD / f"{suite}.log").write_text(text)
    closing = CLOSING[tool_of(suite)].findall(text)
    passed = process.returncode == 0
    return (closing[-1] if closing else "no closing line") + ("" if passed else " (FAILED)"), passed


def read(path: Path) -> dict[str, str]:
    """The `name: value` lines of an earlier result."""
    if not path.exists():
        return {}
    return dict(line.split(": ", 1) for line in path.read_text().splitlines() if ": " in line)


def write(path: Path, about: dict[str, str], results: dict[str, str]) -> None:
    """The result file: the surroundings, then a line for each suite that ran."""
    lines = ["GPU tests (make test-gpu)", "", *(f"{name}: {value}" for name, value in about.items()), ""]
    lines += [f"{suite}: {results[suite]}" for suite in SUITES if suite in results]
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="suites that run beside each other")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compile jobs")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy of the tree without git")
    options = parser.parse_args()
    try:
        build(options.jobs)
        about = context(options.commit)
    except Failure as failure:
        print(f"test-gpu: {failure}", file=sys.stderr)
        return 2
    path = ROOT / "benchmarks" / "results" / f"gpu-tests-{re.sub(r'[^a-z0-9]+', '-', about['GPU'].lower())}.txt"
    earlier = read(path)
    results: dict[str, str] = {}
    if all(earlier.get(name) == value for name, value in about.items()):
        results = {suite: earlier[suite] for suite in SUITES if suite in earlier}
    about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    failed = []
    with ThreadPoolExecutor(max_workers=max(options.at_once, 1)) as pool:
        running = {pool.submit(run, suite): suite for suite in options.suites}
        for done in as_completed(running):
            results[running[done]], passed = done.result()
            failed += [] if passed else [running[done]]
            write(path, about, results)  # each time: an interrupted run leaves what it had
    print(f"wrote {path.relative_to(ROOT)}")
    for suite in options.suites:
        print(f"{suite}: {results[suite]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
