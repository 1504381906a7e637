"""Which kernel runs: forced (argument, MPQ_KERNEL), the best one, the reference without library."""

from __future__ import annotations

import logging
import re
import subprocess

import pytest
import torch

from espnet_mpq.errors import InputError
from espnet_mpq.kernels import build, dispatch
from espnet_mpq.kernels.matrix import KernelMatrix, quantize_rows


def test_the_argument_then_the_variable_then_the_best(kernels, monkeypatch):
    assert dispatch.choose() == kernels[-1] == dispatch.choose("auto")
    assert kernels == tuple(p for p in dispatch.PATHS if p in kernels)
    monkeypatch.setenv("MPQ_KERNEL", "scalar")
    assert dispatch.choose() == "scalar" and dispatch.choose(kernels[-1]) == kernels[-1]
    monkeypatch.setenv("MPQ_KERNEL", "reference")
    assert dispatch.choose() == "reference"
    with pytest.raises(InputError, match="reference is forced"):
        quantize_rows(torch.ones(1, 3))
    for unset in ("", "auto"):
        monkeypatch.setenv("MPQ_KERNEL", unset)
        assert dispatch.choose() == kernels[-1]


def test_unknown_paths_and_those_of_other_machines_are_refused(kernels, monkeypatch):
    monkeypatch.setenv("MPQ_KERNEL", "avx51")
    with pytest.raises(InputError, match="did you mean 'avx512'"):
        dispatch.choose()
    monkeypatch.setattr(dispatch, "available_paths", lambda: ("scalar",))
    with pytest.raises(InputError, match="found 'avx2'; expected scalar, reference"):
        dispatch.choose("avx2")


def test_without_a_library_the_reference_runs_and_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MPQ_KERNEL_LIBRARY", str(tmp_path / "none.so"))
    monkeypatch.delenv("MPQ_KERNEL", raising=False)
    with caplog.at_level(logging.WARNING):
        assert [dispatch.choose() for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1 and "python -m espnet_mpq.kernels.build" in caplog.text
    assert dispatch.library() is None and dispatch.available_paths() == ()
    with pytest.raises(InputError, match="there is no kernel library"):
        dispatch.choose("scalar")
    with pytest.raises(InputError, match="there is no kernel library"):
        KernelMatrix(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1), torch.ones(2), 1, 8)


def test_files_that_are_no_library_of_ours_are_not_used(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setenv("MPQ_KERNEL_LIBRARY", str(broken))
    assert dispatch.library() is None and "is of no use" in dispatch.why_no_library()


def test_a_library_with_another_interface_is_not_used(kernel_library, monkeypatch, tmp_path):
    source, other = tmp_path / "other.cpp", tmp_path / "other.so"
    source.write_text('extern "C" int mpq_abi_version() { return -5; }\n')
    command = [*build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(other)]
    subprocess.run(command, check=True)
    monkeypatch.setenv("MPQ_KERNEL_LIBRARY", str(other))
    assert dispatch.library() is None and "has interface -5" in dispatch.why_no_library()


def enumerators(name: str) -> dict:
    """{name: value} of an enum of api.h."""
    text = (build.SOURCES / "api.h").read_text()
    body = re.sub("//.*", "", re.search(rf"enum {name} : int {{(.*?)}}", text, re.DOTALL).group(1))
    value, found = -1, {}
    for entry in filter(None, map(str.strip, body.split(","))):
        key, _, given = map(str.strip, entry.partition("="))
        value = found[key] = int(given) if given else value + 1
    return found


def test_numbers_of_the_interface_are_those_of_api_h(kernels):
    assert sorted(dispatch.FAILURES) == sorted(set(enumerators("Status").values()) - {0})
    paths = {f"kPath{name}".lower() for name in dispatch.PATHS}
    numbers = enumerators("PathNumber")
    assert {name.lower() for name in numbers} == paths
    assert {name.lower()[5:]: number for name, number in numbers.items()} == dispatch.NUMBERS


def test_the_widest_matrix_is_what_the_library_says(kernels):
    most = dispatch.max_cols()
    assert most == 65536
    levels = torch.tensor([-1, 1], dtype=torch.int8)
    codes = torch.zeros(1, most // 8 + 1, dtype=torch.uint8)
    KernelMatrix(codes[:, :-1], torch.ones(1, 1), levels, 1, most)
    with pytest.raises(InputError, match="at most 65536 columns"):
        KernelMatrix(codes, torch.ones(1, 1), levels, 1, most + 1)


def test_build_says_why_it_failed(monkeypatch, tmp_path, capsys):
    target = tmp_path / "libmpq_kernels.so"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main(["--output", str(target)]) == 1
    assert "no-such-compiler not found" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "false")
    assert build.main(["--output", str(target)]) == 1
    assert not target.exists() and list(tmp_path.iterdir()) == []


def test_other_machines_compile_the_portable_path_alone(kernel_library, monkeypatch, tmp_path):
    portable = build.compile_library(tmp_path / "portable.so", ["-O0"], machine="riscv64")
    monkeypatch.setenv("MPQ_KERNEL_LIBRARY", str(portable))
    assert dispatch.available_paths() == ("scalar",)
