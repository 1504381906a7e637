"""Text files: formats guessed and read, and what is no text."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.text import (
    guess_format,
    read_text,
    read_text_and_format,
    share_of_ids,
    with_host_names,
    write_text,
)


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
        ([f"utt{n or 1} a" for n in range(50)], "kaldi"),
        ([f"utt{n} a" for n in range(50)] * 2, "kaldi"),  # the same text twice
        (["4x4 a", "4x4 b", "4x4 c", "4x4 d", "2x4 e"], "plain"),
        (["9" * 5000 + " a", "1" + "0" * 5000 + " b", "2" + "0" * 5000 + " c"], "kaldi"),
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
        ([f"utt{n} a" for n in range(50)] * 2, True),
        (["001 a", "002 b"] * 2, True),
        (["12 men", "12 angry men"], True),
        (["1984 was a year"], True),
        (["well-known facts", "so-called experts"], True),
        (["hello (u1)", "world (u2)"], True),
        ([f"{chr(97 + n)} word" for n in range(20)], True),  # alice, bob ... may be names
        ([f"{chr(97 + n)} word" for n in range(19)], False),
        ([chr(97 + n) for n in range(26)], False),  # a list of words
        (["well-known facts"], False),
    ],
)
def test_mixed_evidence_is_a_warning(tmp_path, caplog, lines, mixed):
    assert bool(guess_format(lines)[1]) == mixed
    path = write(tmp_path / "text", "\n".join(lines))
    with caplog.at_level(logging.INFO, "espnet_mpq"):
        read_text(path)
    level = logging.WARNING if mixed else logging.INFO
    (guess,) = [r for r in caplog.records if "read as" in r.getMessage()]
    assert guess.levelno == level
    assert "--text_format" in caplog.text
    caplog.clear()
    assert read_text_and_format(path, "plain")[1] == "plain"
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


SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029\u3000\t"


def test_white_space_around_a_sentence_is_no_part_of_it(tmp_path):
    """Separators of Unicode are white space within the line; zero-width signs are letters."""
    inner = f"b{SEPARATORS}c\u200b"
    lines = [f"{SEPARATORS}u1{SEPARATORS}{inner}{SEPARATORS}", "u2\u2028", "u3 \u200b"]
    path = write(tmp_path / "text", "\r\n".join(lines))
    assert read_text(path, "kaldi") == [("u1", inner), ("u3", "\u200b")]
    assert [text for _, text in read_text(path, "plain")][1] == "u2"
    packed = write(tmp_path / "text.gz", gzip.compress(path.read_bytes()))
    assert read_text(packed, "kaldi") == read_text(path, "kaldi")


def test_names_that_come_again_are_said_and_kept(tmp_path, caplog):
    path = write(tmp_path / "text", "u1 a\nu2 b\n\nu1 c\nu1 d\n")
    assert read_text_and_format(path) == (
        [("u1", "a"), ("u2", "b"), ("u1", "c"), ("u1", "d")],
        "kaldi",
    )
    assert "2 of 4 names of utterances are there already (line 4: u1, as in line 1)" in caplog.text
    assert "all sentences are kept" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("a/b", "/tmp/x", "..", ".", "u" * 201, "\u00e9" * 101),
        *("a\u200bb", "a\ufeff", "a\x01", "a$b^$", "u2"),
    ],
)
def test_names_that_no_host_can_take_are_replaced(name):
    good = [("u1", "a"), ("u2", "b"), ("\u00e9:=+@#-_.", "c")]
    assert with_host_names(good) == good
    renamed = with_host_names([*good, (name, "d")])
    assert [text for _, text in renamed] == ["a", "b", "c", "d"]
    assert [utt for utt, _ in renamed] == [f"sentence{n:07d}" for n in range(1, 5)]


@given(
    st.lists(
        st.tuples(
            st.text("ab/.\ufeff", min_size=1, max_size=4),
            st.text("ab" + SEPARATORS + "\u200b ", min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_reads_back(tmp_path_factory, pairs):
    """A text read as Kaldi, renamed, written and read as the host reads: the same sentences."""
    folder = tmp_path_factory.mktemp("written")
    lines = [f"{utt} {text}" for utt, text in pairs]
    path = write(folder / "in", "".join(f"{line}\n" for line in lines))
    try:
        sentences = with_host_names(read_text(path, "kaldi"))
    except InputError as error:
        assert "no sentence" in str(error)
        return
    write_text(folder / "out", sentences)
    with open(folder / "out", encoding="utf-8") as file:
        theirs = [line.rstrip().split(maxsplit=1) for line in file]
    assert [tuple(pair) for pair in theirs] == sentences
    assert len({utt for utt, _ in sentences}) == len(sentences)


@pytest.mark.parametrize(
    "utt, text",
    [("u", "a\nb"), ("u", "a\rb"), ("u", " a"), ("u", "a\u2028"), ("u v", "a"), ("u", "")],
)
def test_no_sentence_is_written_that_reads_back_as_another(tmp_path, utt, text):
    with pytest.raises(InputError, match="sentence 2 cannot be a line of .*out"):
        write_text(tmp_path / "out", [("t", "a"), (utt, text)])
    assert not (tmp_path / "out").exists()


def test_share_of_ids():
    assert share_of_ids(["u1", "a-b", "12", "word"]) == 0.75
