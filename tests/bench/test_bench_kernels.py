"""Smoke run of the kernel benchmark: every system runs and is timed."""

import runpy
from pathlib import Path


def test_smoke(kernels, capsys):
    main = runpy.run_path(str(Path(__file__).with_name("bench_kernels.py")))["main"]
    results = main(["--smoke"])
    assert set(results) == {(50, 1), (50, 3)}
    for found in results.values():
        assert set(found) == {"fp32", "int8", "1 bit", "2 bit", "4 bit", "8 bit"}
        assert all(0 < seconds < 1 for seconds in found.values())
    assert f"kernel {kernels[-1]}" in capsys.readouterr().out
