"""JSON that strangers wrote: bounded in size, depth and digits, and every key once."""

from __future__ import annotations

import json
import re
from typing import Dict, List, Tuple, Union

# An LM of 1000 layers has a header of 6 MB with 70,000 lists and objects and 130,000 commas.
MOST_N_BYTES = 8 << 20
MOST_PARTS = {"[": 60_000, "{": 40_000, ",": 200_000}
MOST_DEPTH = 32
MOST_DIGITS = 300
# Half of a pair that stands for one character; alone it is none and cannot be written again.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(text: Union[bytes, str]) -> object:
    """The value of a JSON text: within a second and 128 MiB, whatever the text is.

    Raises:
        ValueError: not JSON or not UTF-8; more than MOST_N_BYTES bytes, MOST_PARTS of one sign,
            MOST_DEPTH levels or MOST_DIGITS digits of a whole number; NaN, infinity, a key twice
            in one object, or half a character. The message is short, whatever the text is.
    """
    if len(text) > MOST_N_BYTES:
        raise ValueError(f"more than {MOST_N_BYTES} bytes")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    for sign, most in MOST_PARTS.items():
        if text.count(sign) > most:
            raise ValueError(f"more than {most} signs {sign}")
    try:
        value = json.loads(
            text, parse_int=_integer, parse_constant=_constant, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError(f"nested more than {MOST_DEPTH} levels deep") from None
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_characters(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:  # Python before 3.11 takes minutes for a million of them
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> None:
    raise ValueError(f"{name}, which JSON has not")


def _object(pairs: List[Tuple[str, object]]) -> Dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice[:40]!r} twice in one object")
    return value


def _check_depth(value: object) -> None:
    level, depth = [value] if isinstance(value, (dict, list)) else [], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"nested more than {MOST_DEPTH} levels deep")
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]


def _check_characters(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character: {error.object[error.start]!r}") from None
