"""The way of a release: source distribution -> wheel -> fresh environment -> smoke test (`make wheel-test`).

The wheel is built from the unpacked source distribution, so that a file it lacks is noticed, without build isolation:
torch and the build tools are those of the interpreter that runs this. The fresh environment sees that torch and what it
depends on through a .pth file, because a second copy takes gigabytes and minutes; linearard comes from the wheel alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What somebody finds in a wheel, besides the Python files.
CONTENTS = (
    "_C.",
    "_build_config.py",
    "_C.pyi",
    "py.typed",
    "include/linearard/linearard.h",
    "include/linearard/version.h",
    "lib/cmake/linearard/FindLibTorch.cmake",
    "lib/cmake/linearard/linearardConfig.cmake",
    "lib/cmake/linearard/linearardTargets.cmake",
    "lib/liblinearard.so",
    "recipes/demo.yaml",
    "tokens.py",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "wheel-test", help="emptied first")
    parser.add_argument("--wheel", type=Path, help="try this one instead of building it")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    begin = time.perf_counter()
    wheel = arguments.wheel.absolute() if arguments.wheel else build_wheel(work)
    print(f"wheel-test: {wheel.name}, {wheel.stat().st_size / 2**20:.1f} MiB, {time.perf_counter() - begin:.0f} s")
    check_contents(wheel)
    python = make_environment(work / "venv", wheel)
    outside = work / "elsewhere"  # nothing of the source tree can be imported by accident
    outside.mkdir()
    environment = activated(python)
    run([python, ROOT / "tests" / "wheel" / "smoke.py"], cwd=outside, env=environment)
    prefix = output([python, "-m", "linearard", "--cmake-prefix-path"], cwd=outside, env=environment)
    assert prefix.startswith(str(work)), prefix
    consumer = ["-D", f"prefix_path={prefix}", "-D", f"work_dir={work / 'consumer'}"]
    run(["cmake", *consumer, "-P", ROOT / "tests" / "consumer" / "run.cmake"], cwd=outside, env=environment)
    print(f"wheel-test: passed, {time.perf_counter() - begin:.0f} s")


def build_wheel(work: Path) -> Path:
    """The source distribution of the tree, and a wheel from it."""
    run([sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", work / "dist", ROOT])
    (archive,) = (work / "dist").glob("linearard-*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(work)
    tree = work / archive.name.removesuffix(".tar.gz")
    # A fixed build directory below the tree, for ccache.
    settings = ["-C", f"build-dir={tree / 'build'}"]
    run([sys.executable, "-m", "build", "--no-isolation", "--wheel", *settings, "--outdir", work / "dist", tree])
    (wheel,) = (work / "dist").glob("linearard-*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [part for part in CONTENTS if not any(name.startswith(f"linearard/{part}") for name in names)]
    strangers = [name for name in names if not name.startswith("linearard") or "/share/" in name]
    assert not missing, f"the wheel lacks {missing}"
    assert not strangers, f"the wheel has {strangers}"


def make_environment(directory: Path, wheel: Path) -> Path:
    """A fresh virtual environment with the wheel; pip checks that the torch it sees is one that the metadata takes."""
    venv.create(directory, with_pip=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    (packages / "torch_of_the_build.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
    python = directory / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-compile", wheel], cwd=directory)
    return python


def activated(python: Path) -> dict[str, str]:
    """What `activate` sets, and nothing that helps CMake find anything."""
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": str(python.parents[1])}
    for name in ("PYTHONPATH", "CMAKE_PREFIX_PATH", "Torch_DIR", "Torch_ROOT", "LibTorch_ROOT"):
        environment.pop(name, None)
    return environment


def run(command: list[object], **settings: object) -> None:
    print("$", " ".join(map(str, command)), flush=True)
    subprocess.run(list(map(str, command)), check=True, **settings)  # type: ignore[call-overload]


def output(command: list[object], **settings: object) -> str:
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **settings)  # type: ignore[call-overload]
    return str(done.stdout).strip()


if __name__ == "__main__":
    main()
