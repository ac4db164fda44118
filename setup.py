"""Finds the packages and builds the native operators; what cannot be built is named and left out, never fatal.

Torch has to be installed where the build runs, so the operators need ``pip install --no-build-isolation``. The
environment decides: ``FASTMEM_NATIVE=OFF`` leaves out both libraries, ``FASTMEM_CUDA=OFF`` the CUDA one;
``FASTMEM_CUDA=ON`` makes its absence an error; ``CXX``, ``CUDACXX`` and ``CUDA_HOME`` choose the compilers,
``CUDAARCHS`` the GPU architectures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Distribution, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 13)
LIBRARY_FOLDER = Path("fastmem", "backends")
RECORD = "native_build.json"


@dataclass(frozen=True)
class Tools:
    """What the machine offers for the native build; None or empty where a thing was not found."""

    platform: str
    torch_folder: Path | None = None
    torch_version: str = ""
    compiler: str | None = None
    cmake: str | None = None
    nvcc: str | None = None


@dataclass(frozen=True)
class NativePlan:
    """Why each library is left out; an empty reason means that it is built."""

    cpu: str
    cuda: str


def plan_native(tools: Tools, environment: Mapping[str, str]) -> NativePlan:
    """Decide which libraries are built, from the tools and the environment alone.

    Raises: SetupError when a setting has an unknown value, or FASTMEM_CUDA=ON cannot be honoured.
    """
    native = read_setting(environment, "FASTMEM_NATIVE", ("AUTO", "OFF"))
    cuda = read_setting(environment, "FASTMEM_CUDA", ("AUTO", "ON", "OFF"))
    cpu_reason = ""
    if native == "OFF":
        cpu_reason = "FASTMEM_NATIVE=OFF"
    elif tools.platform != "linux":
        cpu_reason = f"the native operators are built on Linux only, not on {tools.platform}"
    elif tools.torch_folder is None:
        cpu_reason = "torch was not found; install it first, then use pip install --no-build-isolation"
    elif parse_version(tools.torch_version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        cpu_reason = f"torch {tools.torch_version} is older than {oldest}, the first with the stable ABI they use"
    elif tools.compiler is None:
        cpu_reason = "no C++ compiler was found; install g++ or set CXX"
    elif tools.cmake is None:
        cpu_reason = "cmake was not found; install it with pip install cmake"
    cuda_reason = cpu_reason
    if not cuda_reason and cuda == "OFF":
        cuda_reason = "FASTMEM_CUDA=OFF"
    if not cuda_reason and tools.nvcc is None:
        cuda_reason = "nvcc was not found; install the CUDA toolkit or set CUDA_HOME"
    if cuda == "ON" and cuda_reason:
        raise SetupError(f"FASTMEM_CUDA=ON asks for the CUDA operators, but {cuda_reason}")
    return NativePlan(cpu_reason, cuda_reason)


def read_setting(environment: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    value = environment.get(name, "").upper() or "AUTO"
    if value not in allowed:
        raise SetupError(f"{name} is {environment[name]!r}; expected one of {', '.join(allowed)}")
    return value


def parse_version(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def find_tools(environment: Mapping[str, str]) -> Tools:
    torch_folder, torch_version = find_torch()
    return Tools(
        platform=sys.platform,
        torch_folder=torch_folder,
        torch_version=torch_version,
        compiler=find_compiler(environment),
        cmake=shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent)),
        nvcc=find_nvcc(environment),
    )


def find_torch() -> tuple[Path | None, str]:
    # importing torch would cost seconds and gigabytes of libraries; its folder and version.py are enough
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, ""
    folder = Path(spec.origin).parent
    version_file = folder / "version.py"
    found = (
        re.search(r"^__version__ = '(.*)'", version_file.read_text(), re.MULTILINE) if version_file.exists() else None
    )
    return folder, found[1] if found else "0"


def find_compiler(environment: Mapping[str, str]) -> str | None:
    if environment.get("CXX"):
        return shutil.which(shlex.split(environment["CXX"])[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    if environment.get("CUDACXX"):
        return shutil.which(environment["CUDACXX"])
    homes = filter(None, map(environment.get, ("CUDA_HOME", "CUDA_PATH")))
    return next(filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes)), shutil.which("nvcc"))


def build_library(part: str, tools: Tools, destination: Path) -> str:
    """Build one library with CMake and put it into a folder; returns why that failed, or an empty string."""
    # cmake remembers a missing compiler and every path: a change of any needs a folder of its own
    parts = (ROOT, tools.torch_folder, tools.torch_version, tools.compiler, tools.nvcc if part == "cuda" else "")
    key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"native-{part}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [
        tools.cmake,
        f"-S{ROOT}",
        f"-B{folder}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DFASTMEM_PART={part}",
        f"-DTORCH_FOLDER={tools.torch_folder}",
    ]
    if part == "cuda":
        configure.append(f"-DCMAKE_CUDA_COMPILER={tools.nvcc}")
    log = folder / "build.log"
    log.unlink(missing_ok=True)
    for command in (configure, [tools.cmake, "--build", str(folder)]):
        with log.open("a") as output:
            failed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if failed:
            return f"they did not compile: {find_error(log.read_text())}; all of it is in {log}"
    destination.mkdir(parents=True, exist_ok=True)
    name = f"_fastmem_{part}.so"
    # a running process may have the old file mapped: replace it whole instead of writing into it
    shutil.copy2(folder / name, destination / f"{name}.new")
    (destination / f"{name}.new").replace(destination / name)
    return ""


def find_error(output: str) -> str:
    """The first complaint of a compiler, in one short line: CMake puts it below its headline."""
    found = re.search(r"^.*(?:error|fatal).*(?:\n.*){0,2}", output, re.MULTILINE | re.IGNORECASE)
    return " ".join(found[0].split())[:200] if found else "no error was printed"


class BuildNative(Command):
    """Build step between the Python files and the wheel: the libraries, and a record of what was left out and why."""

    description = "build the native operators"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        destination = self.destination()
        tools = find_tools(os.environ)
        plan = plan_native(tools, os.environ)
        reasons = {"cpu": plan.cpu, "cuda": plan.cuda}
        for part in reasons:
            # the CUDA library holds only a kernel for the operator that the CPU library defines
            reasons[part] = reasons[part] or reasons["cpu"] or build_library(part, tools, destination)
            if reasons[part]:
                (destination / f"_fastmem_{part}.so").unlink(missing_ok=True)
        if reasons["cuda"] and os.environ.get("FASTMEM_CUDA", "").upper() == "ON":
            raise SetupError(f"FASTMEM_CUDA=ON asks for the CUDA operators, but {reasons['cuda']}")
        if reasons["cuda"]:
            missing = "native" if reasons["cpu"] else "CUDA"
            print(f"fastmem: installing without the {missing} operators: {reasons['cuda']}", file=sys.stderr)
        destination.mkdir(parents=True, exist_ok=True)
        (destination / RECORD).write_text(json.dumps({"torch": tools.torch_version, **reasons}, indent=1) + "\n")
        self.distribution.has_libraries = not reasons["cpu"]

    def destination(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib)) / LIBRARY_FOLDER

    def get_outputs(self) -> list[str]:
        if self.editable_mode:
            return []
        return [str(path) for path in (*self.destination().glob("*.so"), self.destination() / RECORD)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        return [str(path.relative_to(ROOT)) for path in (ROOT / "CMakeLists.txt", *sources)]


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class PlatformDistribution(Distribution):
    has_libraries = False

    def has_ext_modules(self) -> bool:
        return self.has_libraries


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3: of this platform with libraries inside, of any platform without."""

    def run(self):
        # only what was really built can tell the tag
        self.run_command("build_native")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def find_packages() -> list[str]:
    # namespace search: a folder of data needs no __init__.py to be installed
    exclude = ["*__pycache__*"]
    kernels = find_namespace_packages("kernels", exclude=exclude)
    return [
        *find_namespace_packages(include=["fastmem", "fastmem.*"], exclude=exclude),
        "fastmem.kernels",
        *(f"fastmem.kernels.{name}" for name in kernels),
    ]


if __name__ == "__main__":
    setup(
        packages=find_packages(),
        package_dir={"fastmem": "fastmem", "fastmem.kernels": "kernels"},
        # whole folders, so that nobody forgets a file; not backends, where old libraries of this checkout may lie
        package_data={
            "fastmem": ["py.typed"],
            "fastmem.demo": ["*"],
            "fastmem.report": ["*"],
            "fastmem.report.page": ["*"],
        },
        include_package_data=False,
        distclass=PlatformDistribution,
        cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel},
    )
