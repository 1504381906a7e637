"""Transcript files: formats, units, and the errors for files that do not belong together."""

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.hypotheses import pair, read_transcripts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_kaldi_and_trn_files_say_the_same(tmp_path):
    kaldi = write(tmp_path / "text", "u1 HELLO  THE WORLD\nu2\n\nu3 (AH) YES\n")
    trn = write(tmp_path / "trn", "HELLO THE WORLD (u1)\n (u2)\n(AH) YES\t(u3)\n")
    expected = {"u1": ["HELLO", "THE", "WORLD"], "u2": [], "u3": ["(AH)", "YES"]}
    assert read_transcripts(kaldi) == expected
    assert read_transcripts(trn) == expected
    assert list(read_transcripts(trn)) == ["u1", "u2", "u3"]


def test_characters_keep_the_blank_between_words(tmp_path):
    path = write(tmp_path / "text", "u1 ab  c\nu2\nu3 åß\n")
    assert read_transcripts(path, unit="char") == {
        "u1": ["a", "b", "<space>", "c"],
        "u2": [],
        "u3": ["å", "ß"],
    }


def test_forced_format_names_the_line(tmp_path):
    path = write(tmp_path / "trn", "yes (u1)\nno u2\n")
    with pytest.raises(InputError, match="line 2"):
        read_transcripts(path, "trn")


def test_words_with_exotic_line_separators_stay_in_their_line(tmp_path):
    path = write(tmp_path / "text", "u1 a\x0bb\nu2 c\x85d\n")
    assert list(read_transcripts(path)) == ["u1", "u2"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"u1 a\nu2 b\nu1 c\n", "more than once.*u1"),
        (b"\n \n", "no transcript"),
        (b"u1 a\nu2 \xff\xfe\n", "not UTF-8 text: found byte 0xff in line 2; .*iconv -f"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_transcripts(path)


def test_byte_order_mark_and_windows_lines_are_no_part_of_the_words(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffu1 a b\r\nu2\r\n".encode("utf-8"))
    assert read_transcripts(path) == {"u1": ["a", "b"], "u2": []}


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.txt"):
        read_transcripts(tmp_path / "absent.txt")


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
    assert "not in the reference: new" in message


def test_pair_refuses_a_reference_without_words():
    with pytest.raises(InputError, match="no word"):
        pair({"u": []}, {"s": {"u": ["a"]}})
