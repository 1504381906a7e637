"""The roof benchmark measures something possible, and says where a path has no roof."""

import runpy
from pathlib import Path

import pytest

ROOF = runpy.run_path(str(Path(__file__).with_name("roof.py")))


def test_peak_of_every_path(kernels):
    for path in kernels:
        peak = ROOF["peak_macs_per_s"](path, 2, least_s=0.005, n_rounds=1)
        if path == "scalar":
            assert peak is None
        elif path != "neon":
            # 0.1 to 10 GHz, at most 2 instructions a cycle, 2 threads
            assert 1e8 * 16 < peak < 1e10 * 64 * 4


@pytest.mark.parametrize("n_bytes", (1, 1000, 4 << 20))
@pytest.mark.parametrize("n_threads", (1, 2))
def test_read_bandwidth(kernels, n_bytes, n_threads):
    rate = ROOF["read_bytes_per_s"](n_bytes, n_threads, least_s=0.005, n_rounds=1)
    assert 1e8 < rate < 2e12


def test_bench_of_products(kernels, capsys):
    main = runpy.run_path(str(Path(__file__).with_name("bench_products.py")))["main"]
    found = main(["--rows", "40", "--batch", "1", "3", "--rounds", "1", "--least_s", "0.001"])
    assert set(found) == {(bits, batch) for bits in (1, 2, 4, 8) for batch in (1, 3)}
    assert all(0 < seconds < 1 and 0 < of_bandwidth for seconds, _, of_bandwidth in found.values())
    assert f"kernel {kernels[-1]}" in capsys.readouterr().out
