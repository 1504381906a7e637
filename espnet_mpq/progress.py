"""Progress of long work on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Iterable, Iterator, TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], n_items: int, name: str) -> Iterator[T]:
    """Pass items on, with a bar (tqdm, on a terminal) or lines with time to go on stderr."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(items, total=n_items, desc=name, file=sys.stderr)
            return
    start = last = time.monotonic()
    for n_done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= 10 or n_done == n_items:
            last = now
            to_go = (now - start) / n_done * (n_items - n_done)
            print(f"{name}: {n_done}/{n_items}, {to_go:.0f} s to go", file=sys.stderr, flush=True)
