"""Fuzzes one reader for some seconds: guided by coverage with atheris, by mutations without it.

    python tests/fuzz/fuzz_readers.py TARGET --seconds 60 [--seed 1]

A finding is written to build/fuzz/TARGET and ends the run with status 1; put it into
tests/fuzz/corpus/TARGET, where the tests repeat it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Our own code alone: to instrument torch takes minutes.
with atheris.instrument_imports(include=["espnet_mpq"]) if atheris else nullcontext():
    from fuzz import targets


def by_mutations(name: str, seconds: float, seed: int, folder: Path) -> int:
    choose, inputs, n_runs = random.Random(seed), targets.corpus(name), 0
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        data = targets.mutated(choose.choice(inputs), inputs, choose)
        n_runs += 1
        try:
            targets.run(name, data)
        except Exception:
            traceback.print_exc()
            found = folder / hashlib.sha256(data).hexdigest()[:16]
            found.write_bytes(data)
            print(f"{name}: FINDING after {n_runs} inputs: {found}")
            return 1
    print(f"{name}: {n_runs} inputs by mutation, no finding")
    return 0


def by_coverage(name: str, seconds: float, seed: int, folder: Path) -> None:
    start = folder / "corpus"
    start.mkdir(exist_ok=True)
    for number, data in enumerate(targets.corpus(name)):
        (start / f"seed{number}").write_bytes(data)
    options = [f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=65536", "-timeout=10"]
    options += ["-rss_limit_mb=3000", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(start)], lambda data: targets.run(name, data))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=targets.TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutations", action="store_true", help="without atheris")
    args = parser.parse_args()
    folder = Path("build/fuzz") / args.target
    folder.mkdir(parents=True, exist_ok=True)
    if atheris is None:
        args.mutations = True
        print("atheris is not installed: mutations without coverage")
    if not args.mutations:
        by_coverage(args.target, args.seconds, args.seed, folder)
    return by_mutations(args.target, args.seconds, args.seed, folder)


if __name__ == "__main__":
    sys.exit(main())
