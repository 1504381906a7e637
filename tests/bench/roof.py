"""The measured roof of this machine: 8-bit multiply-adds and bytes read a second.

Commands:
    python tests/bench/roof.py                 one thread
    python tests/bench/roof.py --threads 1 2

The bounds that a product of packed codes cannot pass: batch * rows * cols / peak_macs_per_s, and
the resident bytes / read_bytes_per_s.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from espnet_mpq.kernels import build

SOURCE = Path(__file__).resolve().parent / "csrc" / "roof.cpp"
# The kernels' numbering; the scalar path has no fixed instructions, so it has no roof.
NUMBERS = {"avx2": 1, "avx512": 2, "avx512vbmi": 2, "neon": 4}


@lru_cache(maxsize=None)
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "libroof.so.1"
        flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"]
        command = [*build.find_compiler(), *flags, str(SOURCE), "-o", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise build.BuildError(done.stderr.strip()[-2000:])
        opened = ctypes.CDLL(str(file))
    opened.roof_macs.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    opened.roof_read.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    opened.roof_macs.restype = opened.roof_read.restype = ctypes.c_double
    return opened


def peak_macs_per_s(path: str, n_threads: int = 1, least_s: float = 0.1, n_rounds: int = 5):
    """Multiply-adds a second of a path's own instructions on registers alone.

    Args:
        path: one of dispatch.PATHS that this machine can run.

    Returns:
        The median of ``n_rounds`` runs of ``least_s`` seconds; None where a path has no roof
        (scalar, neon without dot products).

    Raises:
        BuildError: no compiler.
    """
    if path not in NUMBERS:
        return None
    found = [
        _library().roof_macs(NUMBERS[path], n_threads, least_s) for _ in range(max(1, n_rounds))
    ]
    return statistics.median(found) or None


def read_bytes_per_s(
    n_bytes: int, n_threads: int = 1, least_s: float = 0.1, n_rounds: int = 5
) -> float:
    """Sustained bytes read a second over a resident buffer of ``n_bytes``, shared by the threads.

    Huge pages where the system gives them. Median of ``n_rounds`` runs of ``least_s`` seconds.

    Raises:
        BuildError: no compiler.
        MemoryError: no room for the buffer.
    """
    found = [_library().roof_read(n_bytes, n_threads, least_s) for _ in range(max(1, n_rounds))]
    if not all(found):
        raise MemoryError(f"no {n_bytes} bytes for the bandwidth benchmark")
    return statistics.median(found)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--mib", type=float, nargs="+", default=[0.0156, 0.5, 2, 8, 64, 512])
    args = parser.parse_args(arguments)
    from espnet_mpq.kernels import dispatch

    print(f"{platform.machine()}, paths {', '.join(dispatch.available_paths())}")
    for n in args.threads:
        for path in dispatch.available_paths():
            peak = peak_macs_per_s(path, n)
            if peak:
                print(f"{n} threads, {path}: {peak / 1e9:.1f} G multiply-adds/s")
        for mib in args.mib:
            rate = read_bytes_per_s(int(mib * 2**20), n)
            print(f"{n} threads, {mib:g} MiB: {rate / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
