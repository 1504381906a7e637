"""Files are written whole or not at all, and say what is wrong with them."""

import errno
import os

import pytest

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
        (errno.EDQUOT, "free disk space or choose another folder; nothing was changed"),
        (errno.EFBIG, "free disk space or choose another folder; nothing was changed"),
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
