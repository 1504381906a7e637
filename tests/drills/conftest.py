"""How long the drills go on, and their random numbers."""

from __future__ import annotations

import os
import random
import time
from typing import Iterator

import pytest


@pytest.fixture
def rounds(request):
    """rounds(n) -> random generators, one for each round, each with a seed that is printed.

    Short form: n rounds. $MPQ_DRILL_SECONDS: so many seconds for every test instead,
    $MPQ_DRILL_N: so many rounds, $MPQ_DRILL_SEED: only the round of this seed.
    """

    def make(n: int) -> Iterator[random.Random]:
        seconds = float(os.environ.get("MPQ_DRILL_SECONDS", 0))
        n = int(os.environ.get("MPQ_DRILL_N", 0 if seconds else n))
        given = os.environ.get("MPQ_DRILL_SEED")
        begin, i = time.monotonic(), 0
        seeds = [int(given)] if given else None
        while i < len(seeds) if seeds else (i < n if n else time.monotonic() - begin < seconds):
            seed = seeds[i] if seeds else random.SystemRandom().randrange(2**32)
            print(f"{request.node.name}: MPQ_DRILL_SEED={seed}", flush=True)
            yield random.Random(seed)
            i += 1
        print(f"{request.node.name}: {i} rounds in {time.monotonic() - begin:.0f} s", flush=True)

    return make
