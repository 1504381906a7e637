"""The short form of make fuzz: kept inputs, then mutations from a fixed seed; C entry points."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from espnet_mpq.kernels import build

from fuzz import targets  # isort: skip

HARNESS = Path(__file__).resolve().parent / "csrc" / "fuzz_kernels.cpp"
N_MUTATIONS = 150


@pytest.mark.parametrize("name", targets.TARGETS)
def test_kept_inputs_and_mutations(name):
    inputs, choose = targets.corpus(name), random.Random(name)
    assert inputs
    for data in inputs:
        targets.run(name, data)
    for _ in range(N_MUTATIONS):
        targets.run(name, targets.mutated(choose.choice(inputs), inputs, choose))


def test_changed_bytes_of_a_packed_file_are_never_loaded():
    choose, inputs = random.Random(5), targets.corpus("packed")
    for _ in range(N_MUTATIONS):
        data = targets.mutated(choose.choice(inputs), inputs, choose)
        if data not in inputs:
            with pytest.raises(targets.MpqError):
                targets.from_bytes(data)


def test_c_entry_points_give_the_same_bits_on_every_path(kernels, kernel_library, tmp_path):
    if b"__asan_" in kernel_library.read_bytes():
        pytest.skip("a program that is not sanitized cannot open a sanitized library")
    program = tmp_path / "fuzz_kernels"
    command = [*build.find_compiler(), "-std=c++17", "-O1", "-DMPQ_STANDALONE", str(HARNESS)]
    command += [str(kernel_library), f"-Wl,-rpath,{kernel_library.parent}", "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program), "300", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
