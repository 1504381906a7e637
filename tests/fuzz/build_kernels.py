"""Compiles the fuzzer of the C entry points with $CXX (clang++): libFuzzer, address, undefined."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from espnet_mpq.kernels import build

HARNESS = Path(__file__).resolve().parent / "csrc" / "fuzz_kernels.cpp"
# The unrolled tiles of the vector paths take clang many minutes with more than the addresses.
PATHS = ["-O1", "-gline-tables-only", "-fsanitize=address"]
OTHERS = ["-O1", "-g", "-fsanitize=address,undefined,fuzzer-no-link", "-fno-sanitize-recover=all"]


def main(output: str) -> None:
    compiler = build.find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source, flags in build.sources().items():
            more = PATHS if source.name.startswith("path_") else OTHERS
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            flags = [flag for flag in flags if "uninitialized" not in flag]
            command = [*compiler, *flags, *more, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, check=True)
        link = ["-std=c++17", "-pthread", *OTHERS, "-fsanitize=fuzzer", str(HARNESS), *objects]
        subprocess.run([*compiler, *link, "-o", output], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
