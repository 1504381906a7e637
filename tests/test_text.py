"""Text files: formats guessed and read, and what is no text."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.text import guess_format, read_text


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["an406-fcaw-b ERASE C", "an407-fcaw-b HELLO"], "kaldi"),
        (["1089-134686-0000 HE HOPED", "1089-134686-0001 STUFF IT"], "kaldi"),
        (["the cat", "a dog"], "plain"),
        (["utt1 a", "utt1 b"], "plain"),
        (["1984 was a year", "2001 another"], "plain"),
        (["he said", "she said", "they said", "4th of july"], "plain"),
        (["0001 HELLO", "0002 WORLD"], "kaldi"),
        (["9 a", "10 b", "11 c"], "kaldi"),
        (["spk-a one", "spk-b two"], "kaldi"),
        (["spk_a one", "spk_b two"], "kaldi"),
        ([f"utt{n or 1} a" for n in range(500)], "kaldi"),  # one repeated id
        ([f"utt{n or 1} a" for n in range(50)], "plain"),
        (["10 men", "9 men", "8 men", "no men"], "plain"),
        (["well-known facts"], "plain"),
        (["- hello", "- who is there"], "plain"),
        (["12 men", "12 angry men"], "plain"),
        ([], "plain"),
    ],
)
def test_guesses_the_format(lines, expected):
    assert guess_format(lines)[0] == expected


@pytest.mark.parametrize(
    "lines, mixed",
    [
        (["0001 a", "0002 b"], False),
        (["utt1 a", "utt2 b"], False),
        (["the cat", "a dog", "4th of july"], False),
        (["1984 was a year", "2001 another"], True),
        (["300 a", "200 b", "100 c"], True),  # one width, in no order
        ([f"utt{n or 1} a" for n in range(500)], True),
        (["utt1 a", "utt1 b"], True),
        (["utt1 a", "utt2 b", "hello c"], True),
    ],
)
def test_mixed_evidence_is_a_warning(tmp_path, caplog, lines, mixed):
    assert guess_format(lines)[1] == mixed
    path = write(tmp_path / "text", "\n".join(lines))
    with caplog.at_level(logging.INFO, "espnet_mpq"):
        read_text(path)
    level = logging.WARNING if mixed else logging.INFO
    assert [r.levelno for r in caplog.records] == [level]
    assert "--text_format" in caplog.text
    caplog.clear()
    read_text(path, "plain")
    assert caplog.text == ""


def test_reads_plain_kaldi_and_gzip(tmp_path, caplog):
    plain = write(tmp_path / "plain", "a b\n\n  \r\nc\r\n")
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        assert read_text(plain) == [("line0000001", "a b"), ("line0000004", "c")]
    assert "2 of 4 lines are empty" in caplog.text
    kaldi = write(tmp_path / "text", "\ufeffutt-1 a  b \nutt-2\nutt-3 \u00e9t\u00e9\n")
    assert read_text(kaldi) == [("utt-1", "a  b"), ("utt-3", "\u00e9t\u00e9")]
    assert read_text(kaldi, "plain")[1] == ("line0000002", "utt-2")
    packed = write(tmp_path / "t.gz", gzip.compress(b"a b\nc"))
    assert [s for _, s in read_text(packed)] == ["a b", "c"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no sentence: found an empty file"),
        (b"\n \n", "no sentence: found 2 lines, all empty"),
        (b"good\nbad \xff\n", "not UTF-8 text: found byte 0xff in line 2"),
    ],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_text(write(tmp_path / "text", content))


def test_bad_arguments(tmp_path):
    with pytest.raises(InputError, match="cannot read the text .*nothing"):
        read_text(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot read the text .*bad.gz"):
        read_text(write(tmp_path / "bad.gz", b"no gzip"))
    with pytest.raises(InputError, match="did you mean 'kaldi'"):
        read_text(tmp_path / "nothing", "kaldy")
