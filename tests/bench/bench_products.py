"""Products of packed codes against the roof: share of the multiply-add rate and of the bandwidth.

Commands:
    python tests/bench/bench_products.py
    python tests/bench/bench_products.py --rows 600000 --batch 1     beyond the caches

A product is one call from Python: activations arranged, rows multiplied, int32 copied out. The
share of the multiply-add rate counts the unpadded matrix; that of the bandwidth, resident bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.quant.grid import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent))
import roof  # noqa: E402


def random_matrix(rows: int, cols: int, bits: int) -> KernelMatrix:
    codes = torch.randint(0, 256, (rows, -(-cols * bits // 8)), dtype=torch.uint8)
    levels = torch.tensor(make_grid("uniform", bits).levels, dtype=torch.int8)
    return KernelMatrix(codes, torch.ones(1, 1), levels, bits, cols)


def seconds(call, least_s: float) -> float:
    n, start_s = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - start_s < least_s:
        call()
        n += 1
    return (time.perf_counter() - start_s) / n


def main(arguments=None) -> dict:
    """Print the table; returns (bits, batch) -> (seconds, share of rate or None, of bandwidth)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2600, help="default: 4 gates of 650")
    parser.add_argument("--cols", type=int, default=650)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 10, 20, 60])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least_s", type=float, default=0.004)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path, found = dispatch.choose(), {}
    print(f"{args.rows} x {args.cols}, 1 thread, kernel {path}")
    for bits in args.bits:
        matrix = random_matrix(args.rows, args.cols, bits)
        for batch in args.batch:
            x = torch.randint(-127, 128, (batch, args.cols)).to(torch.int8)
            n_macs, times_s, of_rate, of_bandwidth = args.rows * args.cols * batch, [], [], []
            for _ in range(args.rounds):
                # The roof of the same moment: other work on the machine slows both.
                peak = roof.peak_macs_per_s(path, 1, args.least_s, 1)
                read = roof.read_bytes_per_s(matrix.n_bytes, 1, args.least_s, 1)
                times_s.append(seconds(lambda: matrix.product(x, path), args.least_s))  # noqa: B023
                of_rate.append(n_macs / times_s[-1] / peak if peak else float("nan"))
                of_bandwidth.append(matrix.n_bytes / times_s[-1] / read)
            values = [statistics.median(of) for of in (times_s, of_rate, of_bandwidth)]
            found[bits, batch] = tuple(values)
            print(
                f"{bits} bit, batch {batch:>2}: {1e6 * values[0]:>8.1f} us, "
                f"{100 * values[1]:>4.0f} % of the multiply-add rate, "
                f"{100 * values[2]:>4.0f} % of the bandwidth",
                flush=True,
            )
    return found


if __name__ == "__main__":
    main()
