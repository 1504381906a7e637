"""Files are written whole or not at all, and say what is wrong with them."""

import errno
import gzip
import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from espnet_mpq import io
from espnet_mpq.errors import InputError, MpqError


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.json"
    io.write_json(path, {"b": 1, "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ü"\n}\n'
    io.atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert os.listdir(path.parent) == ["a.json"]


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    io.atomic_write(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.bin \(3 bytes\): found No space left"):
        io.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EDQUOT, "free disk space or choose another folder; this file is as it was"),
        (errno.EFBIG, "free disk space or choose another folder; this file is as it was"),
        (errno.EROFS, "choose another folder"),
        (errno.EIO, None),
    ],
)
def test_advice_fits_the_error(tmp_path, monkeypatch, number, words):
    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(io.os, "fsync", fail)
    with pytest.raises(InputError) as error:
        io.atomic_write(tmp_path / "a", b"new")
    end = os.strerror(number) + (f"; {words}" if words else "")
    assert str(error.value) == f"cannot write {tmp_path / 'a'} (3 bytes): found {end}"


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="a directory") as error:
        io.atomic_write(tmp_path / "a", b"new")
    assert "disk space" not in str(error.value) and os.listdir(tmp_path) == ["a"]


def test_read_json_errors(tmp_path):
    with pytest.raises(InputError, match="cannot read .*No such file"):
        io.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_bytes(b"{\xff")
    with pytest.raises(InputError, match="is not JSON"):
        io.read_json(tmp_path / "bad.json")


def test_known_hashes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert io.sha256_file(tmp_path / "abc") == known == io.sha256_bytes(b"abc")
    assert io.token_list_sha256(["a", "b"]) == io.sha256_bytes(b"a\nb")


def test_errors_are_not_runtime_errors():
    """The host catches RuntimeError while loading a model; ours must get through."""
    assert not issubclass(MpqError, RuntimeError)
    assert str(MpqError("x", found=1, expected=2, todo="do y")) == "x: found 1; expected 2; do y"


SEPARATORS = "\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2007\u2028\u2029\u202f\u3000\u200b\u2060"


@given(st.text(alphabet="ab \n\r" + SEPARATORS, max_size=30))
def test_lines_are_those_of_a_file_opened_as_text(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("lines") / "text"
    path.write_bytes(content.encode("utf-8"))
    try:
        lines = io.read_lines(path)
    except InputError as error:
        assert "\r" in content.replace("\r\n", "") and "carriage return inside" in str(error)
        return
    with open(path, encoding="utf-8") as file:
        theirs = [line.rstrip("\n") for line in file]
    assert [line for line in lines if line] == [line for line in theirs if line]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_lines_of_every_system_are_the_same(tmp_path, ends):
    path = tmp_path / "text"
    lines = ["\ta" + SEPARATORS + "b", "", " c ", "\ufeffd\ufeff"]
    path.write_bytes(ends.join(["\ufeff" + lines[0], *lines[1:], ""]).encode("utf-8"))
    assert io.read_lines(path) == [*lines[:3], "d\ufeff"]  # a mark in a line is the text's
    zipped = tmp_path / "zipped"  # known by its first bytes, too
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert io.read_lines(zipped) == io.read_lines(path)
    path.write_bytes(b"a\r\nb\r\r\nc\r")  # converted twice, and cut short
    assert io.read_lines(path) == ["a", "b", "c"]
    path.write_bytes(b"")
    assert io.read_lines(path) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"good\nbad \xff\n", "not UTF-8 text: found byte 0xff in line 2; convert it: iconv"),
        ("\ufeffabc".encode("utf-16-le"), r"byte 0xff in line 1 \(it begins like UTF-16\)"),
        ("ab\ncd".encode("utf-16-be"), "byte 0x00 in line 1; if it is UTF-16"),
        (b"a\nb\0\n", "byte 0x00 in line 2"),
        (b"a\r\nb\rc\r\n", "line 2: found a carriage return inside the line"),
        (b"a\n\rb\n", "line 2: found a carriage return inside"),
        (gzip.compress(b"a\n" * 99)[:-9], "cannot read the text"),
        (gzip.compress(b"abc" * 99)[:12] + b"\xff" * 30, "cannot read the text"),
        (None, "cannot read the text .*: found No such file"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        io.read_lines(path)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InputError, match="cannot read the text .*: found Is a directory"):
        io.read_lines(tmp_path)


def test_json_has_no_nan_and_no_infinity(tmp_path):
    value = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": np.float64("inf"), "d": "NaN"}, "e": 1}
    wanted = {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}, "e": 1}
    io.write_json(tmp_path / "a.json", value)
    assert io.read_json(tmp_path / "a.json") == wanted == json.loads(io.to_json(value))
    assert math.isnan(value["a"][0])  # the caller's value stays


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_no_json_are_refused(constant, tmp_path):
    (tmp_path / "a.json").write_text(f'{{"a": [{constant}]}}')
    words = f"a.json is not JSON: found {constant}, which JSON has not"
    with pytest.raises(InputError, match=words):
        io.read_json(tmp_path / "a.json")


def test_xz_is_read_as_what_is_in_it_and_damage_is_named(tmp_path):
    import lzma

    data = lzma.compress(b"a\nb c\n\nd")
    for name in ("t.xz", "t"):  # by its name or by its first bytes
        (tmp_path / name).write_bytes(data)
        assert io.read_lines(tmp_path / name) == ["a", "b c", "", "d"]
    (tmp_path / "cut.xz").write_bytes(data[:-9])
    with pytest.raises(InputError, match="cannot read the text .*cut.xz"):
        io.read_lines(tmp_path / "cut.xz")
    (tmp_path / "no.xz").write_bytes(b"plain")
    with pytest.raises(InputError, match="cannot read the text .*no.xz"):
        io.read_lines(tmp_path / "no.xz")
    stream = io.stream_lines(tmp_path / "t.xz")
    assert next(stream) == "a" and list(stream) == ["b c", "", "d"]
