"""Text handed to the host's trainer: it reads the tokens that were counted, whatever the text."""

from __future__ import annotations

import errno
import os
import re

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.text import read_text

SPACES = "\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u3000"
ZERO_WIDTH = "\u200b\u200c\u2060\ufeff"


@pytest.fixture(scope="module")
def exp(host, fp_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    return load_fp_lm(fp_exp.path)


def written_and_read(exp, text_file, folder):
    """(sentences as we count them, {name: ids as the host's dataset gives them}, shapes)."""
    from espnet2.fileio.read_text import load_num_sequence_text
    from espnet2.train.dataset import ESPnetDataset

    from espnet_mpq.hosts.espnet.lm.tokenizer import build_tokenizer, tokenize
    from espnet_mpq.hosts.espnet.lm.train import _write_set

    sentences = read_text(text_file, "kaldi")
    n_tokens = _write_set(exp, sentences, folder)
    shapes = load_num_sequence_text(folder / "shape")
    data = ESPnetDataset([(str(folder / "text"), "text", "text")], build_tokenizer(exp.args))
    theirs = {name: data[name][1]["text"] for name in shapes}
    ours = [ids.numpy() for ids in tokenize(exp, sentences).ids if len(ids)]
    assert n_tokens == sum(len(ids) + 1 for ids in ours)
    assert len(list(data)) == len(shapes)
    return ours, theirs, shapes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text("ab \r" + SPACES + ZERO_WIDTH, max_size=8), min_size=1, max_size=5))
def test_the_host_reads_the_tokens_that_were_counted(exp, tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("set")
    (folder / "in").write_bytes("".join(f"u1 a{line}\n" for line in lines).encode("utf-8"))
    try:
        ours, theirs, shapes = written_and_read(exp, folder / "in", folder / "out")
    except InputError as error:
        assert "\r" in "".join(lines) and "carriage return" in str(error)
        return
    assert [list(ids) for ids in ours] == [list(ids) for ids in theirs.values()]
    assert [[len(ids)] for ids in ours] == list(shapes.values())


def test_names_are_the_hosts_problem_no_more(exp, tmp_path):
    """Repeated names, and names that its attention plots would take for paths."""
    lines = ["../../x a", "u1 b", "u1 c d", "/tmp/u it", "\u200b he", "u1"]
    (tmp_path / "in").write_text("\n".join(lines), encoding="utf-8")
    ours, theirs, shapes = written_and_read(exp, tmp_path / "in", tmp_path / "out")
    assert list(theirs) == [f"sentence{n:07d}" for n in range(1, 6)]
    assert all(map(numpy.array_equal, ours, theirs.values())) and len(ours) == 5
    (tmp_path / "in").write_text("u1 a\nu2 b\n", encoding="utf-8")
    assert list(written_and_read(exp, tmp_path / "in", tmp_path / "out")[1]) == ["u1", "u2"]


@pytest.mark.parametrize("token", ["a ", "a\u2028", "a\nb", "a\r", ""])
def test_a_token_list_is_written_as_the_host_reads_it(tmp_path, token):
    from espnet_mpq.hosts.espnet.lm.train import _write_token_list

    good = ["<blank>", " ", "\u3000", "\x85", "\u2581a", "a\u2028b", "<sos/eos>"]
    _write_token_list(good, tmp_path / "tokens.txt")
    with open(tmp_path / "tokens.txt", encoding="utf-8") as file:
        assert [line[0] + line[1:].rstrip() for line in file] == good
    with pytest.raises(InputError, match="token 1 of the LM cannot be a line"):
        _write_token_list(["<blank>", token], tmp_path / "tokens.txt")


def test_the_tokenizer_is_that_of_the_lm_whatever_the_training_config(exp, fp_exp, tmp_path):
    """A cleaner in --train_config would make other tokens than were counted."""
    from espnet_mpq.hosts.espnet.lm.train import train_lm

    config = tmp_path / "train.yaml"
    config.write_text(
        "{lm: seq_rnn, lm_conf: {unit: 16, nlayers: 2}, cleaner: tacotron, optim: sgd, "
        "num_workers: 0, use_tensorboard: false, use_matplotlib: false}\n"
    )
    text = [("u1", "it is"), ("u1", "he has")]
    out = train_lm(exp, config, text, text, tmp_path / "run", max_epoch=1)
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    args = load_fp_lm(out).args
    assert args.cleaner is None and args.token_type == "char"


@pytest.mark.parametrize(
    "error, free, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True, "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected"), False, "No space"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), False, "No space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . x"), True, "RuntimeError: .enf"),
        (ValueError("odd"), False, "ValueError: odd"),
    ],
)
def test_a_full_disk_is_said_plainly(tmp_path, monkeypatch, error, free, message):
    from espnet_mpq.hosts.espnet.lm import train

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if not free:
        monkeypatch.setattr(os, "fsync", full)
    outer = RuntimeError("while saving")
    outer.__cause__ = error
    for one in (error, outer) if isinstance(error, OSError) else (error,):
        made = train._stopped(one, tmp_path)
        assert re.search("found " + message, str(made)), str(made)
        is_full = message.startswith("No space")
        assert getattr(made, "is_full", False) == is_full
        assert ("free disk space; the same command goes on" in str(made)) == is_full
        assert "nothing was changed" not in str(made)
