"""Transcript files: formats, how they are told apart, and files that do not belong together."""

import logging
import time

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.hypotheses import pair, read_together, read_transcripts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_kaldi_trn_and_plain_files_say_the_same(tmp_path):
    kaldi = write(tmp_path / "text", "u1 HELLO  THE WORLD\nu2\n\nu3 (AH) YES\n")
    trn = write(tmp_path / "trn", "HELLO THE WORLD (u1)\n (u2)\n(AH) YES\t(u3)\n")
    plain = write(tmp_path / "plain", "HELLO THE WORLD\n\n(AH) YES\n")
    expected = {"u1": ["hello", "the", "world"], "u2": [], "u3": ["(ah)", "yes"]}
    assert read_transcripts(kaldi) == expected
    assert read_transcripts(trn) == expected
    assert list(read_transcripts(trn)) == ["u1", "u2", "u3"]
    assert list(read_transcripts(plain, "plain").values()) == list(expected.values())
    with pytest.raises(InputError, match="unknown format 'kladi'.*'kaldi'"):
        read_transcripts(kaldi, "kladi")


def formats_of(folder, *contents):
    """The first letter of the format of each file."""
    paths = {f"f{n}": write(folder / f"f{n}", content) for n, content in enumerate(contents)}
    return "".join(name[0] for name in read_together(paths)[1].values())


@pytest.mark.parametrize(
    "contents, formats",
    [
        # Every line of the hypotheses ends in (word), once or more often.
        (["u1 a\nu2 b\n", "u1 a (x)\nu2 b (y)\n"], "kk"),
        (["u1 a (x)\nu2 b (x)\n"], "k"),
        (["u1 a (x)\nu2 b (y)\n", "u1 a (x)\nu2 b (y)\n"], "kk"),
        (["u1 hm (u2)\nu2 oh (u3)\n", "u1 hm\nu2 oh (u3)\n"], "kk"),
        # Files of two formats.
        (["u1 a b\nu2 c\n", "a b (u1)\nc (u2)\n", "u2 c\nu1 a\n"], "ktk"),
        (["a b (u1)\nc (u2)\n", "a b (u1)\n(u2)\n"], "tt"),
        (["the cat (1)\nthe dog (2)\n"], "t"),
        (["1 the cat\n2 the dog (x)\n"], "k"),
        (["u1 (noise)\nu2 (noise)\n"], "k"),
        (["u1\nu2\n", "u1 a\nu2 b\n"], "kk"),
    ],
)
def test_the_format_gives_all_files_the_same_utterances(tmp_path, contents, formats):
    assert formats_of(tmp_path, *contents) == formats


def test_the_format_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "espnet_mpq"):
        formats_of(tmp_path, "u1 a\nu2 b\n", "a (u1)\nb (u2)\n")
    assert "f0: read as kaldi lines, `utt words`" in caplog.text
    assert "f1: read as trn lines, `words (utt)`" in caplog.text
    assert {r.levelno for r in caplog.records} == {logging.INFO}


@pytest.mark.parametrize(
    "content", ["u1 a (x1)\nu2 b (x2)\n", "one a (x)\ntwo b (y)\n", "u1 a (u1)\nu2 b (u2)\n"]
)
def test_two_formats_that_fit_are_a_question(tmp_path, content):
    with pytest.raises(InputError, match="two formats fit .*f0, .*f1.*give --text_format"):
        formats_of(tmp_path, content, content)
    for name in ("kaldi", "trn"):
        assert len(read_transcripts(tmp_path / "f0", name)) == 2


def test_what_is_doubtful_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        assert formats_of(tmp_path, "u1 a (x)\nu2 b (y)\n") == "k"
    assert "also readable as trn, read as kaldi" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        assert formats_of(tmp_path, "the cat\na dog\n", "the cat\na bird\n") == "kk"
    assert "taken for the name of its utterance (the, a)" in caplog.text
    assert "--text_format plain" in caplog.text


@pytest.mark.parametrize(
    "content, kind",
    [
        ("u1 1 0.0 0.3 hello\nu2 1 0.25 0.3 world 0.9\n", "ctm"),
        (";; made by hand\nu1 A 0.00 0.30 hello 1.0\nu1 A 0.30 0.20 you 0.5\n", "ctm"),
        ("call 1 spk 0.0 2.5 <o,f0,male> hello you\ncall 1 spk 2.5 3.0 hm\n", "stm"),
        ('{"id": "u1", "text": "hello"}\n{"id": "u2", "text": ""}\n', "JSON"),
    ],
)
def test_other_files_are_named(tmp_path, content, kind):
    with pytest.raises(InputError, match=f"looks like a {kind} file"):
        read_transcripts(write(tmp_path / "other", content))


def test_forced_format_names_the_line(tmp_path):
    for last in ("no u2", "no (u2", "no u2)", "no (u 2)", "no ()", "no (a)b)"):
        path = write(tmp_path / "trn", f"yes (u1)\n{last}\n")
        with pytest.raises(InputError, match="line 2: found .*trn files"):
            read_transcripts(path, "trn")


def test_words_with_exotic_line_separators_stay_in_their_line(tmp_path):
    """White space as the host's scoring stage splits at it; zero-width signs are part of words."""
    path = write(tmp_path / "text", "u1 a\x0bb\x1cc\u2028d\u00a0e\nu2 c\x85d\u200be\ufefff\n")
    assert read_transcripts(path) == {"u1": list("abcde"), "u2": ["c", "d\u200be\ufefff"]}
    trn = write(tmp_path / "trn", "a\x0bb\u2028(u1)\u00a0\n\x85(u2)\n")
    assert read_transcripts(trn, "trn") == {"u1": ["a", "b"], "u2": []}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"u1 a\nu2 b\n\nu1 c\n", r"more than once: found u1 \(lines 1 and 4\)"),
        (b"a (u1)\na c (u1)\n", r"more than once: found u1 \(lines 1 and 2\)"),
        (b"\n \n", "no transcript"),
        (b"", "no transcript"),
        (b"u1 a\nu2 \xff\xfe\n", "not UTF-8 text: found byte 0xff in line 2; .*iconv -f"),
        (b"u1 a\nu2 b\rc\n", "line 2: found a carriage return inside the line"),
        (b"u1 a\nu2 b\0\n", "byte 0x00 in line 2"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_transcripts(path)


def test_byte_order_mark_and_windows_lines_are_no_part_of_the_words(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffu1 a b\r\nu2\r\n\ufeffu3 c\r\n".encode("utf-8"))
    assert read_transcripts(path) == {"u1": ["a", "b"], "u2": [], "u3": ["c"]}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.txt"):
        read_transcripts(tmp_path / "absent.txt")


def test_a_long_line_takes_no_time(tmp_path):
    path = write(tmp_path / "trn", "a" + " " * 500_000 + "(b" + "(" * 100_000 + " (u1)\n")
    start = time.monotonic()
    assert len(read_transcripts(path, "trn")["u1"]) == 2
    assert time.monotonic() - start < 2


def test_pair_orders_by_utterance():
    utts, refs, hyps = pair(
        {"b": ["x"], "a": ["y"]}, {"s": {"a": ["1"], "b": ["2"]}, "t": {"b": ["3"], "a": []}}
    )
    assert (utts, refs) == (["a", "b"], [["y"], ["x"]])
    assert hyps == {"s": [["1"], ["2"]], "t": [[], ["3"]]}


def test_pair_lists_missing_and_extra_utterances():
    ref = {f"u{i}": ["a"] for i in range(9)}
    hyp = {"u0": ["a"], "new": ["b"]}
    with pytest.raises(InputError) as error:
        pair(ref, {"mixed": hyp})
    message = str(error.value)
    assert "mixed" in message and "u1, u2, u3, u4, u5, ... (8 in all)" in message
    assert "not in the reference: new" in message and "--text_format plain" in message


def test_signs_that_cannot_be_seen_are_shown():
    with pytest.raises(InputError, match=r"missing: u1; not in the reference: 'u1\\u200b'"):
        pair({"u1": ["a"]}, {"s": {"u1\u200b": ["a"]}})


def test_pair_refuses_a_reference_without_words():
    with pytest.raises(InputError, match="no word"):
        pair({"u": []}, {"s": {"u": ["a"]}})
