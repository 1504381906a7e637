"""The projection benchmark runs, at a tiny size."""

import importlib.util
from pathlib import Path


def test_bench_projection(capsys):
    path = Path(__file__).with_name("bench_projection.py")
    spec = importlib.util.spec_from_file_location("bench_projection", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.main(["--n_rows", "6", "--n_cols", "40"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2 * 4 * 2
    rows = bench.measure(6, 40)
    errors = {(r["tying"], r["grid"], r["bits"], r["method"]): r["relative_error"] for r in rows}
    for tying, grid, bits, _ in errors:
        # A warm start from the optimum stays there.
        mse, als = (errors[tying, grid, bits, method] for method in ("mse", "als"))
        assert als <= mse * (1 + 1e-3)
        assert mse <= errors["cluster", grid, bits, "mse"] * (1 + 1e-3)
