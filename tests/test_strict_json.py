"""JSON of strangers: what is refused, with a short reason, in little time and memory."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espnet_mpq.strict_json import MOST_DEPTH, MOST_DIGITS, MOST_N_BYTES, MOST_PARTS, parse

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES.filter(lambda value: "inf" not in json.dumps(value).lower()))
def test_what_json_writes_is_read(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert parse(text) == value


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"\xff{}", "utf-8"),
        ("{", "Expecting"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' twice"),
        ('{"x": [{"a": 1, "a": 1}]}', "key 'a' twice"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ('["\\ud800"]', "half a character"),
        ('{"\\uDC00": 1}', "half a character"),
        ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "levels deep"),
        ("[" * 50_000 + "]" * 50_000, "levels deep"),
        ("1" * (MOST_DIGITS + 1), "digits"),
        ("-" + "1" * 100_000, "digits"),
        (b" " * MOST_N_BYTES + b"1", "bytes"),
    ],
)
def test_what_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as info:
        parse(text)
    assert len(str(info.value)) < 200


def test_the_limits_themselves_are_taken():
    assert parse("1" * MOST_DIGITS) == int("1" * MOST_DIGITS)
    assert parse("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    assert parse(b" " * (MOST_N_BYTES - 1) + b"1") == 1
    assert parse('["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]


MOST = min(MOST_PARTS.values())
HOSTILE = {
    "keys": "{%s}" % ",".join(f'"{i:x}":1' for i in range(MOST_PARTS[","])),
    "lists": "[%s]" % ",".join(["[]"] * (MOST - 1)),
    "objects": "[%s]" % ",".join(['{"a":1.5}'] * MOST),
    "texts": "[%s]" % ",".join(['"ab"'] * MOST_PARTS[","]),
    "nests": "[%s]" % ",".join(["[" * 30 + "]" * 30] * (MOST // 31)),
    "a key": '{"%s":1}' % ("x" * (MOST_N_BYTES - 10)),
    "digits": "[%s]" % ",".join(["9" * MOST_DIGITS] * (MOST_N_BYTES // (MOST_DIGITS + 2))),
    "too many": "[%s]" % ",".join(["[]"] * (MOST_N_BYTES // 3 - 2)),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_takes_a_second_or_128_mib(text):
    data = text.encode()
    start_s = time.process_time()
    refused_or_read(data)
    assert time.process_time() - start_s < 3  # of a busy machine; an idle one takes 0.4
    if len(data) < 2 << 20:  # tracing takes ten times as long
        tracemalloc.start()
        refused_or_read(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20


def refused_or_read(data: bytes) -> None:
    try:
        parse(data)
    except ValueError:
        pass
