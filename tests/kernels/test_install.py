"""setup.py: the kernel library beside the package with a compiler; without, all but the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from espnet_mpq.kernels import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build_ext(tmp_path, monkeypatch):
    def run(compiler):
        monkeypatch.setenv("CXX", str(compiler))
        folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
        command = [sys.executable, "setup.py", "build_ext", *folders]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        library = tmp_path / "lib" / "espnet_mpq" / "kernels" / build.LIBRARY.name
        return library, done.stdout + done.stderr

    return run


def test_without_a_compiler_the_installation_goes_on(build_ext, tmp_path):
    library, output = build_ext(tmp_path / "no-such-compiler")
    assert not library.exists() and "the reference will run" in output


def test_each_instruction_set_has_its_own_file_and_flags(build_ext, tmp_path):
    """With a compiler that only writes down what it is asked."""
    fake = tmp_path / "c++"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        'while [ "$1" != -o ]; do shift; done\necho made > "$2"\n'
    )
    fake.chmod(0o755)
    library, _ = build_ext(fake)
    assert library.read_text() == "made\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert not any("-march" in call or "-ffast-math" in call for call in calls)
    avx512 = [call for call in calls if "-mavx512" in call]
    assert len(avx512) == 2 * build.is_x86()
    assert all("path_avx512.cpp" in call or "path_avx512vbmi.cpp" in call for call in avx512)
    assert sum("-mavx2" in call for call in calls) == build.is_x86()
    assert sum("-ffp-contract=off" in call for call in calls) == len(calls) - 1
