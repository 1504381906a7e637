"""Time and error of projecting the weights of an LM: python tests/bench/bench_projection.py."""

from __future__ import annotations

import argparse
import time
from typing import Dict, List

import torch

from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.quant.projection import project


def measure(n_rows: int, n_cols: int, n_rounds: int = 3) -> List[Dict]:
    """One row per grid, tying and method; "als" starts from the scales of "mse"."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(n_rows, n_cols, generator=generator)
    results = []
    for tying, w in (("row", weights), ("cluster", weights.reshape(1, -1))):
        for name in ("paper", "uniform"):
            for bits in (1, 2, 4, 8):
                grid = make_grid(name, bits)
                for method in ("mse", "als"):
                    start = None if method == "mse" else found.scale  # noqa: F821
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    found = project(w, grid, method=method, init_scale=start, rounds=n_rounds)
                    row = {"tying": tying, "grid": name, "bits": bits, "method": method}
                    row["wall_s"] = time.perf_counter() - begin
                    row["cpu_s"] = time.process_time() - begin_cpu
                    row["relative_error"] = relative_error(w, found.values)
                    results.append(row)
    return results


def main(args: List[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n_rows", type=int, default=10500, help="default: 6.8 M weights")
    parser.add_argument("--n_cols", type=int, default=650)
    parser.add_argument("--n_threads", type=int, default=1)
    options = parser.parse_args(args)
    torch.set_num_threads(options.n_threads)
    print(f"{options.n_rows} x {options.n_cols} Gaussian weights, torch {torch.__version__}")
    print(f"{'tying':<9}{'grid':<9}{'bits':>4} {'method':<7}{'wall_s':>9}{'cpu_s':>9}{'error':>12}")
    for row in measure(options.n_rows, options.n_cols):
        print(
            f"{row['tying']:<9}{row['grid']:<9}{row['bits']:>4} {row['method']:<7}"
            f"{row['wall_s']:>9.3f}{row['cpu_s']:>9.3f}{row['relative_error']:>12.3g}"
        )


if __name__ == "__main__":
    main()
