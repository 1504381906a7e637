"""Files that are no checkpoint are named for what they are; every flipped bit is found."""

from __future__ import annotations

import argparse
import datetime
import gzip
import io
import os
import pickle
import random
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch

from espnet_mpq.errors import CheckpointError, InputError
from espnet_mpq.file_kind import refuse_unfetched
from espnet_mpq.io import read_json
from espnet_mpq.state_file import is_whole, read_file

STATE = {"lm.a": torch.arange(6.0).view(2, 3), "lm.b": torch.tensor([1, 2])}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12\n" % (b"0" * 64)
ANNEX = b"/annex/objects/SHA256E-s100--0123.pth\n"


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(compression=zipfile.ZIP_STORED, **files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("valid.loss.best.pth"))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


def trainer() -> bytes:
    stats = {1: {"train": {"time": datetime.timedelta(seconds=1)}}}
    return saved({"model": STATE, "optimizers": [{}], "reporter": {"stats": stats}})


SAFETENSORS = len(b"{}      ").to_bytes(8, "little") + b"{}      " + bytes(8)
OTHERS = {
    "empty": (lambda: b"", ["an empty file"]),
    "zeros": (lambda: bytes(4096), ["zero bytes"]),
    "lfs": (lambda: LFS, ["a Git LFS pointer", "git lfs pull --include 'a b.pth'"]),
    "annex": (lambda: ANNEX, ["a git-annex pointer", "git annex get"]),
    "html": (lambda: b"\n<!DOCTYPE html><html>sign in", ["an HTML page", "download the file"]),
    "xml": (lambda: b"<?xml version='1.0'?><Error/>", ["a server's error message?"]),
    "json": (lambda: b'{"message": "Not Found"}', ["a text file that begins with '{\"mess"]),
    "text": (lambda: "é lm_conf: 1\n".encode() * 200, ["a text file that begins with 'é lm"]),
    "gzip": (lambda: gzip.compress(saved(STATE)), ["a gzip file", "unpack it"]),
    "tar": (tar, ["a tar archive", "unpack it"]),
    "safetensors": (lambda: SAFETENSORS, ["a safetensors file", "ends with .safetensors"]),
    "numpy": (lambda: b"\x93NUMPY\x01\x00" + bytes(100), ["a NumPy array"]),
    "npz": (lambda: zipped(**{"a.npy": "x"}), ["a zip archive of other things (a.npy)"]),
    "espnet": (lambda: zipped(**{"meta.yaml": "x"}), ["meta.yaml", "unpack it"]),
    "empty zip": (lambda: zipped(), ["a zip archive of other things (nothing)"]),
    "pickle": (lambda: pickle.dumps({"lm.a": [1]}), ["a pickle that torch.save did not write"]),
    "random": (lambda: bytes(range(255, 0, -1)), ["bytes of another kind", "ff fe fd"]),
    "script": (script, ["a TorchScript program"]),
    "objects": (lambda: saved({"a": argparse.Namespace()}), ["argparse.Namespace", "state_dict"]),
    "trainer": (trainer, ["the state of a training", "valid.loss.best.pth"]),
    "truncated": (lambda: saved(STATE)[:-200], ["a truncated or damaged file"]),
    "legacy cut": (
        lambda: saved(STATE, _use_new_zipfile_serialization=False)[:-9],
        ["copy or download it again"],
    ),
    "bomb": (
        lambda: zipped(zipfile.ZIP_DEFLATED, a__data_pkl="", **{"a__data.pkl": bytes(10**7)}),
        ["a zip archive that torch.save did not write"],
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_checkpoint_is_named(name, tmp_path):
    make, parts = OTHERS[name]
    path = tmp_path / "a b.pth"
    path.write_bytes(make())
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as a checkpoint: found ")
    assert "weights_only" not in message and "expected a file of weights" in message
    for part in parts:
        assert part in message


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("5epoch.pth")
    (tmp_path / "annex").symlink_to("../.git/annex/objects/aa/bb/SHA256E-s1--c.pth/SHA256E-s1")
    os.mkfifo(tmp_path / "pipe")
    for name, part in (
        ("folder", "a folder"),
        ("link", "a link to 5epoch.pth, which is not there"),
        ("annex", f"git annex get {tmp_path}/annex"),
        ("pipe", "no regular file"),
        ("missing", "No such file"),
    ):
        with pytest.raises(CheckpointError, match=part):
            read_file(tmp_path / name)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_files_of_every_torch_are_read(options, tmp_path):
    (tmp_path / "a\n:,\u00e9.pth").write_bytes(saved(STATE, **options))
    state = read_file(tmp_path / "a\n:,\u00e9.pth")
    assert list(state) == list(STATE) and all(torch.equal(state[k], STATE[k]) for k in STATE)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    state = {"lm.w": torch.from_numpy(np.random.default_rng(0).normal(size=(20, 30)))}
    data, path, rng = saved(state), tmp_path / "a.pth", random.Random(1)
    inside = data.index(state["lm.w"].numpy().tobytes())
    places = [inside + 8 * rng.randrange(600) for _ in range(40)]
    places += [rng.randrange(len(data)) for _ in range(150)]
    n_refused = 0
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            read = read_file(path)
        except CheckpointError:
            n_refused += 1
            continue
        assert not inside <= place < inside + 4800
        assert list(read) == ["lm.w"] and torch.equal(read["lm.w"], state["lm.w"])
    assert n_refused > 100
    path.write_bytes(data)
    assert is_whole(path)


def test_pointers_in_place_of_other_files(tmp_path):
    for content, part in ((LFS, "git lfs pull"), (b"<html>", "an HTML page")):
        (tmp_path / "plan.json").write_bytes(content)
        with pytest.raises(InputError, match=part):
            read_json(tmp_path / "plan.json")
    (tmp_path / "config.yaml").symlink_to("nowhere")
    with pytest.raises(InputError, match="a link to nowhere"):
        refuse_unfetched(tmp_path / "config.yaml")
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):  # left to their readers
        refuse_unfetched(tmp_path / name)
