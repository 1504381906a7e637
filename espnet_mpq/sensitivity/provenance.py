"""What a sensitivity table was measured on: the keys, their types, and which must agree."""

from __future__ import annotations

import re
from typing import Mapping, Tuple

from espnet_mpq.fields import is_count, is_in, is_integer, is_list, is_number, is_text, need
from espnet_mpq.plan import BITS, GRIDS, SCALE_N_BYTES, TYINGS

PROBES = ("rademacher", "gaussian")
TRACES = ("average", "plain")
ROUNDINGS = ("nearest", "second_order")
UNITS = ("nats/token", "nats/frame")
# What two runs must share for their entries to stand in one table.
IDENTITY = (
    "checkpoint_sha256",
    "token_list_sha256",
    "text_sha256",
    "text_format",
    "max_tokens",
    "data_sha256",
    "max_seconds",
    "unit",
    "seed",
    "grid",
    "tying",
    "group_size",
    "scale_dtype",
    "probe",
    "trace",
    "rounding",
    "rounding_tokens",
    "clusters",
)
# What a difference in one of them means.
WORDS = {
    "method": "made by another method",
    "checkpoint_sha256": "made from another checkpoint",
    "token_list_sha256": "made with another token list",
    "text_sha256": "measured on another text",
    "text_format": "the text was read in another format",
    "max_tokens": "measured on another number of tokens",
    "data_sha256": "measured on other speech",
    "max_seconds": "measured on another amount of speech",
    "unit": "measured in another unit",
    "seed": "measured on another sample of sentences",
    "grid": "made for another grid",
    "tying": "made for another tying of scales",
    "group_size": "made for another group size",
    "scale_dtype": "made for scales of another type",
    "probe": "made with other random vectors",
    "trace": "made from another form of the trace",
    "rounding": "measured with another rounding",
    "rounding_tokens": "rounded with another number of tokens",
    "clusters": "made for a model with other clusters",
}


def apart(mine: object, other: object) -> Tuple[object, object]:
    """Two values for a message; of two lists what the other one lacks, if that tells them apart."""
    if isinstance(mine, list) and isinstance(other, list):
        own = [x for x in mine if x not in other], [x for x in other if x not in mine]
        return own if any(own) else (mine, other)
    return mine, other


def short(value: object) -> str:
    """A value for a message; the first 12 digits of a SHA-256 are enough to tell it."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return "none" if value is None else repr(value)[:80]


# Key of the provenance -> (check, what it must be); every key may be absent or null.
PROVENANCE = {
    **{key: (is_text, "a string") for key in IDENTITY if key.endswith("_sha256")},
    "text_format": (is_text, "a string"),
    "max_tokens": (is_count, "an integer, at least 0"),
    "max_seconds": (lambda value: is_number(value) and value >= 0, "a number, at least 0"),
    "unit": (is_in(UNITS), " or ".join(UNITS)),
    "seed": (is_integer, "an integer"),
    "group_size": (is_count, "an integer"),
    "grid": (is_in(GRIDS), " or ".join(GRIDS)),
    "tying": (is_in(TYINGS), " or ".join(TYINGS)),
    "scale_dtype": (is_in(SCALE_N_BYTES), " or ".join(SCALE_N_BYTES)),
    "probe": (is_in(PROBES), " or ".join(PROBES)),
    "trace": (is_in(TRACES), " or ".join(TRACES)),
    "rounding": (is_in(ROUNDINGS), " or ".join(ROUNDINGS)),
    "rounding_tokens": (is_count, "an integer, at least 0"),
    "clusters": (is_list(is_text), "a list of names"),
    "bits": (is_list(lambda n: is_integer(n) and n in BITS), f"a list of some of {BITS}"),
}


def check_provenance(provenance: object, where: str) -> None:
    """Raise FormatError unless every known key has a value of its type."""
    need(isinstance(provenance, Mapping), where, "provenance", provenance, "an object")
    for key, (check, expected) in PROVENANCE.items():
        value = provenance.get(key)
        need(value is None or check(value), where, key, value, expected)
    inputs = provenance.get("inputs", {})
    need(isinstance(inputs, Mapping), where, "inputs", inputs, "an object")
    for role, file in inputs.items():
        is_right = isinstance(file, Mapping) and is_text(file.get("path"))
        is_right = is_right and is_text(file.get("sha256"))
        need(is_right, where, f"input {role}", file, "path and sha256")
