"""Every path against plain loops in a program without Python; 64-bit ARM under an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from espnet_mpq.kernels import build, dispatch

PROGRAM = Path(__file__).parent / "csrc" / "compare_paths.cpp"
N_SHAPES = str(min(2000, int(os.environ.get("MPQ_N_EXAMPLES", "100"))))
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


def compile_program(library: Path, output: Path) -> Path:
    command = [*build.find_compiler(), "-std=c++17", "-O2", str(PROGRAM), str(library)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}", "-o", str(output)], check=True)
    return output


def is_sanitized(library: Path) -> bool:
    return b"__asan_" in library.read_bytes()


def numbers(paths) -> str:
    return "".join(f" {dispatch.PATHS.index(path)}" for path in paths)


def test_here(kernels, kernel_library, tmp_path):
    if is_sanitized(kernel_library):
        pytest.skip("a program that is not sanitized cannot open a sanitized library")
    program = compile_program(kernel_library, tmp_path / "compare")
    done = subprocess.run([str(program), N_SHAPES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == f"{N_SHAPES} shapes, paths{numbers(kernels)}\n"


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory):
    for tool in (ARM_COMPILER, ARM_EMULATOR):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", ARM_COMPILER)
        library = build.compile_library(folder / "libmpq_kernels.so.1", machine="aarch64")
        return compile_program(library, folder / "compare")


@pytest.mark.parametrize("cpu", ("cortex-a57", "cortex-a76"))
def test_arm64_without_and_with_dot_products(arm_program, cpu):
    command = [
        ARM_EMULATOR,
        "-L",
        "/usr/aarch64-linux-gnu",
        "-cpu",
        cpu,
        str(arm_program),
        N_SHAPES,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{N_SHAPES} shapes, paths{numbers(('scalar', 'neon'))}\n"
