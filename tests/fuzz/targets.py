"""What is fuzzed: readers of bytes, each of which may raise the project's errors and no other."""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Callable, Dict, List

from espnet_mpq.errors import MpqError
from espnet_mpq.io import read_json, read_lines
from espnet_mpq.packed.format import from_bytes, to_bytes
from espnet_mpq.packed.metadata import self_hash
from espnet_mpq.plan import Plan
from espnet_mpq.search.nas_options import NasOptions
from espnet_mpq.sensitivity.table import SensitivityTable
from espnet_mpq.text import read_text

CORPUS = Path(__file__).resolve().parent / "corpus"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MOST_S = 3.0  # of one input, CPU time of a busy machine


@lru_cache(maxsize=None)
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="mpq_fuzz_")) / "input"


def packed(data: bytes) -> None:
    """What is accepted is the one spelling of what it means: no changed byte is overlooked."""
    assert to_bytes(from_bytes(data)) == data


def sealed(data: bytes) -> None:
    """A packed file whose metadata are ``data``, with the hash that they claim, over no tensors."""
    try:
        metadata = json.loads(data)
        metadata["metadata_sha256"] = self_hash(metadata)
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        outer = json.dumps({"__metadata__": {"espnet_mpq": text}}, separators=(",", ":"))
        header = outer.encode()
    except (ValueError, TypeError, RecursionError):
        return
    from_bytes(len(header).to_bytes(8, "little") + header)


def plan(data: bytes) -> None:
    _file().write_bytes(data)
    read = Plan.read(_file())
    again = Plan.from_dict(read.to_dict())
    assert again == read and again.to_dict() == read.to_dict()


def table(data: bytes) -> None:
    _file().write_bytes(data)
    read = SensitivityTable.read(_file())
    value = read.to_dict()
    assert SensitivityTable.from_dict(value).to_dict() == value


def nas_options(data: bytes) -> None:
    _file().write_bytes(data)
    read = NasOptions.from_dict(read_json(_file()))
    assert NasOptions.from_dict(read.to_dict()) == read


def text(data: bytes) -> None:
    _file().write_bytes(data)
    logging.disable(logging.WARNING)  # a warning for every other input
    lines = read_lines(_file())
    assert not any(set(line) & set("\n\r\0") for line in lines)
    try:
        sentences = read_text(_file())
    finally:
        logging.disable(logging.NOTSET)
    assert len(sentences) <= len(lines) and all(name and words for name, words in sentences)


TARGETS: Dict[str, Callable[[bytes], None]] = {
    one.__name__: one for one in (packed, sealed, plan, table, nas_options, text)
}


def run(name: str, data: bytes) -> None:
    """One input; raises for a finding: another exception, or too much time."""
    start_s = time.process_time()
    try:
        TARGETS[name](data)
    except MpqError as error:
        assert len(str(error)) < 50_000, "an endless message"
    took_s = time.process_time() - start_s
    assert took_s < MOST_S, f"{took_s:.1f} s"


def corpus(name: str) -> List[bytes]:
    """The inputs that mutations start from: kept ones, golden files and what they hold."""
    found = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    if name == "packed":
        found += [path.read_bytes() for path in sorted(GOLDEN.glob("packed_*.safetensors"))]
    if name in ("sealed", "plan"):
        for path in sorted(GOLDEN.glob("packed_*.safetensors")):
            metadata = from_bytes(path.read_bytes()).metadata
            found.append(json.dumps(metadata if name == "sealed" else metadata["plan"]).encode())
    return found


WORDS = [b"null", b"true", b"NaN", b"-1", b"0", b"1e999", b"2147483648", b"[]", b"{}", b'""', b"\0"]
WORDS += [b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xc2\x85", b"\\ud800", b"[" * 40, b"9" * 400]


def mutated(data: bytes, others: List[bytes], choose: random.Random) -> bytes:
    """``data`` after one to four changes: bits, bytes, words, pieces cut, doubled or taken over."""
    made = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at, kind = choose.randint(0, len(made)), choose.randrange(7)
        end = min(len(made), at + choose.choice((1, 2, 4, 16, 100)))
        if kind == 0 and at < len(made):
            made[at] ^= 1 << choose.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = choose.randrange(256)
        elif kind == 2:
            made[at:at] = choose.choice(WORDS)
        elif kind == 3:
            made[at:end] = choose.choice(WORDS)
        elif kind == 4:
            del made[at:end]
        elif kind == 5:
            made[at:at] = made[at:end] * choose.choice((1, 2, 30))
        else:
            other = choose.choice(others)
            start = choose.randint(0, len(other))
            made[at:end] = other[start : start + (end - at)]
    return bytes(made[: 1 << 16])
