import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent

spec = importlib.util.spec_from_file_location("fastmem_setup", ROOT / "setup.py")
fastmem_setup = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = fastmem_setup
spec.loader.exec_module(fastmem_setup)

EVERYTHING = fastmem_setup.Tools(
    platform="linux",
    torch_folder=Path("torch"),
    torch_version="2.14.1+cu130",
    compiler="g++",
    cmake="cmake",
    nvcc="nvcc",
)


@pytest.mark.parametrize(
    ("changes", "environment", "cpu", "cuda"),
    [
        ({}, {}, "", ""),
        ({}, {"FASTMEM_CUDA": "ON"}, "", ""),
        ({}, {"FASTMEM_CUDA": "off"}, "", "FASTMEM_CUDA=OFF"),
        ({}, {"FASTMEM_CUDA": "", "FASTMEM_NATIVE": "auto"}, "", ""),
        ({}, {"FASTMEM_NATIVE": "OFF"}, "FASTMEM_NATIVE=OFF", "FASTMEM_NATIVE=OFF"),
        ({"nvcc": None}, {}, "", "nvcc was not found"),
        ({"torch_version": "2.13.0+cpu"}, {}, "", ""),
        ({"torch_version": "2.12.1"}, {}, "torch 2.12.1 is older than 2.13", "torch 2.12.1 is older than 2.13"),
        ({"torch_version": "3.0.0"}, {}, "", ""),
        ({"torch_folder": None}, {}, "torch was not found", "torch was not found"),
        ({"compiler": None}, {}, "no C++ compiler was found", "no C++ compiler was found"),
        ({"cmake": None}, {}, "cmake was not found", "cmake was not found"),
        ({"platform": "darwin"}, {}, "Linux only, not on darwin", "Linux only, not on darwin"),
    ],
    ids=str,
)
def test_plan_says_why_a_library_is_left_out(changes, environment, cpu, cuda):
    plan = fastmem_setup.plan_native(replace(EVERYTHING, **changes), environment)
    for reason, expected in ((plan.cpu, cpu), (plan.cuda, cuda)):
        assert bool(reason) == bool(expected)
        assert expected in reason


@pytest.mark.parametrize(
    ("changes", "environment", "text"),
    [
        ({"nvcc": None}, {"FASTMEM_CUDA": "ON"}, "FASTMEM_CUDA=ON asks for the CUDA operators, but nvcc was not found"),
        ({"torch_folder": None}, {"FASTMEM_CUDA": "ON"}, "but torch was not found"),
        ({}, {"FASTMEM_CUDA": "ON", "FASTMEM_NATIVE": "OFF"}, "but FASTMEM_NATIVE=OFF"),
        ({}, {"FASTMEM_CUDA": "yes"}, "FASTMEM_CUDA is 'yes'; expected one of AUTO, ON, OFF"),
        ({}, {"FASTMEM_NATIVE": "ON"}, "FASTMEM_NATIVE is 'ON'; expected one of AUTO, OFF"),
    ],
    ids=str,
)
def test_plan_refuses_what_it_cannot_honour(changes, environment, text):
    with pytest.raises(SetupError, match=text):
        fastmem_setup.plan_native(replace(EVERYTHING, **changes), environment)


def test_tools_are_searched_where_the_environment_points(tmp_path, monkeypatch):
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fastmem_setup.find_nvcc({}) is None
    assert fastmem_setup.find_nvcc({"CUDA_HOME": str(tmp_path / "cuda")}) == str(nvcc)
    assert fastmem_setup.find_nvcc({"CUDA_HOME": "nowhere", "CUDACXX": str(nvcc)}) == str(nvcc)
    assert fastmem_setup.find_compiler({}) is None
    assert fastmem_setup.find_compiler({"CXX": f"{nvcc} -m64"}) == str(nvcc)
    assert fastmem_setup.find_compiler({"CXX": "no-such-compiler"}) is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("-- ok\nCMake Error at a.cmake:603 (message):\n  No compiler.\n\n-- more\n", "(message): No compiler."),
        ("a.cpp: In function\na.cpp:3:1: error: 'x' was not declared\n", "a.cpp:3:1: error: 'x' was not declared"),
        ("killed\n", "no error was printed"),
    ],
    ids=["cmake", "compiler", "silent"],
)
def test_first_error_of_a_failed_build_is_told(output, expected):
    assert fastmem_setup.find_error(output).endswith(expected)


def test_torch_is_found_without_importing_it():
    code = "import setup, sys; print(setup.find_torch()[1], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    version, imported = done.stdout.split()
    assert fastmem_setup.parse_version(version) >= (2, 6)
    assert imported == "False"


def test_every_folder_with_code_is_packaged():
    folders = {path.parent for room in ("fastmem", "kernels") for path in (ROOT / room).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    expected = {name.replace("kernels", "fastmem.kernels", 1) if name.startswith("kernels") else name for name in names}
    done = subprocess.run(
        [sys.executable, "-c", "import setup; print(*setup.find_packages())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected <= set(done.stdout.split())


def build_wheel(folder: Path, **environment: str) -> Path:
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fastmem", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, source]
    subprocess.run(command, check=True, env=os.environ | environment)
    return next(folder.glob("*.whl"))


def status_of_installed(wheel: Path, folder: Path) -> dict:
    zipfile.ZipFile(wheel).extractall(folder)
    code = (
        "import json; from fastmem.backends import native; import fastmem.kernels; found = native.status(); "
        "print(json.dumps([str(found.folder), found.cpu, found.cuda, found.reason]))"
    )
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return dict(zip(("folder", "cpu", "cuda", "reason"), json.loads(done.stdout), strict=True))


@pytest.mark.heavy
def test_wheel_without_compiler_is_pure_and_imports(tmp_path):
    wheel = build_wheel(tmp_path, CXX="no-such-compiler", FASTMEM_CUDA="AUTO")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    found = status_of_installed(wheel, tmp_path / "installed")
    assert (found["folder"], found["cpu"]) == (str(tmp_path / "installed/fastmem/backends"), False)
    assert "no C++ compiler was found" in found["reason"]


@pytest.mark.heavy
@pytest.mark.skipif(
    bool(fastmem_setup.plan_native(fastmem_setup.find_tools(os.environ), {}).cpu),
    reason="this machine cannot build the native operators",
)
def test_wheel_with_libraries_is_of_this_platform_and_any_python(tmp_path):
    wheel = build_wheel(tmp_path, FASTMEM_CUDA="OFF")
    assert "-py3-none-linux_" in wheel.name
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert libraries == ["fastmem/backends/_fastmem_cpu.so"]
    data = {f"fastmem/demo/{path.name}" for path in (ROOT / "fastmem/demo").glob("*.*") if path.is_file()}
    assert data <= set(zipfile.ZipFile(wheel).namelist())
    found = status_of_installed(wheel, tmp_path / "installed")
    assert (found["cpu"], found["cuda"]) == (True, False)
    assert "FASTMEM_CUDA=OFF" in found["reason"]
