"""N-best lists of the host, of JSON lines and of Kaldi: the same lists; what is wrong is said."""

from __future__ import annotations

import gzip
import json
import tarfile

import numpy
import pytest

from espnet_mpq.decode.nbest import read_nbest
from espnet_mpq.errors import InputError


def write_rank(folder, rank, rows):
    """rows: utterance -> (text, score); tokens are the letters of the text."""
    folder = folder / f"{rank}best_recog"
    folder.mkdir(parents=True)
    for name in ("text", "score", "token"):
        lines = []
        for utt, (text, score) in rows.items():
            value = {"text": text, "score": f"tensor({score})", "token": " ".join(text)}[name]
            lines.append(f"{utt} {value}\n")
        (folder / name).write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def host_folder(tmp_path):
    """Two jobs; b has one hypothesis, an empty one; job 10 comes after job 2."""
    write_rank(tmp_path / "logdir/output.2", 1, {"a": ("the cat", -1.25), "b": ("", "-0.5")})
    write_rank(tmp_path / "logdir/output.2", 2, {"a": ("the hat", "-2.5, device='cuda:0'")})
    write_rank(tmp_path / "logdir/output.10", 1, {"c": ("é 東", 3.0)})
    write_rank(tmp_path / "logdir/output.10", 2, {"c": ("e", -4)})
    return tmp_path


def test_host_folder(host_folder):
    lists = read_nbest(host_folder)
    assert [one.utt for one in lists] == ["a", "b", "c"]
    assert lists[0].texts == ["the cat", "the hat"] and lists[1].texts == [""]
    assert lists[0].scores["score"].tolist() == [-1.25, -2.5]
    assert lists[0].tokens[1] == "t h e h a t" and lists[1].tokens == [""]
    assert lists[2].texts == ["é 東", "e"]
    assert lists[0].lengths().tolist() == [6, 6] and lists[1].lengths().tolist() == [0]


def test_merged_and_logdir_forms(host_folder):
    whole = read_nbest(host_folder / "logdir")
    assert [one.utt for one in whole] == ["a", "b", "c"]
    merged = read_nbest(host_folder / "logdir/output.10")
    assert [one.utt for one in merged] == ["c"] and len(merged[0]) == 2


def test_real_folders_and_json_lines_are_the_same(data_root, tmp_path):
    folder = data_root / "nbest_librispeech_espnet"
    with tarfile.open(folder / "espnet2_decode_dirs.tar.xz") as tar:
        members = [m for m in tar if "dev_clean/logdir" in m.name]
        tar.extractall(tmp_path, members=members)
    (found,) = tmp_path.rglob("logdir")
    host = {one.utt: one for one in read_nbest(found.parent)}
    lines = read_nbest(folder / "dev_clean.jsonl.gz")
    assert len(lines) == len(host) == 2703
    for one in lines:
        other = host[one.utt]
        assert one.texts == other.texts and one.tokens == other.tokens
        assert numpy.array_equal(one.scores["score"], other.scores["score"])


def test_json_lines(tmp_path):
    rows = [
        {"id": "a", "ref": "x", "hyps": [{"text": " p  q", "scores": {"ctc": -1}, "score": -2}]},
        {"id": "b", "hyps": []},
        {"id": 3, "hyps": [{"text": "", "scores": {"ctc": 0}, "score": 1}]},
    ]
    path = tmp_path / "n.jsonl.gz"
    text = "\n".join(map(json.dumps, rows))
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    a, b, c = read_nbest(path)
    assert a.texts == ["p q"] and a.ref == "x" and a.tokens is None and len(b) == 0
    assert {name: x.tolist() for name, x in a.scores.items()} == {"ctc": [-1.0], "score": [-2.0]}
    assert c.utt == "3" and a.lengths().tolist() == [2]


def test_kaldi(tmp_path):
    for job, utts in (("archives.1", ("s-1", "s-2")), ("archives.2", ("t",))):
        folder = tmp_path / job
        folder.mkdir()
        keys = [f"{utt}-{n}" for utt in utts for n in (2, 1, 10)]
        words = "".join(f"{key} {key.replace('-', ' ')}\n" for key in keys)
        (folder / "words_text").write_text(words)
        for name, scale in (("acwt", 10), ("lmwt.nolm", 1)):
            lines = "".join(f"{key} {scale * int(key.split('-')[-1])}\n" for key in keys)
            (folder / name).write_text(lines)
    lists = read_nbest(tmp_path)
    assert [one.utt for one in lists] == ["s-1", "s-2", "t"]
    assert lists[2].texts == ["t 1", "t 2", "t 10"]
    assert lists[0].scores["acwt"].tolist() == [-10, -20, -100]
    assert lists[0].scores["lmwt.nolm"].tolist() == [-1, -2, -10]
    (tmp_path / "archives.2/words_text").write_text("t1 no number\n")
    (tmp_path / "archives.2/acwt").write_text("t1 5\n")
    (tmp_path / "archives.2/lmwt.nolm").write_text("t1 5\n")
    with pytest.raises(InputError, match="found t1; expected utt-N"):
        read_nbest(tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "score").write_text("a tensor(nan)\n"), r"score nan of a, hypothesis 2"),
        (lambda f: (f / "score").write_text("a -inf\n"), "no finite numbers.*-inf"),
        (lambda f: (f / "score").write_text("a best\n"), "the score of a: found 'best'"),
        (lambda f: (f / "score").write_text("a 1\nb 2\n"), "not of the same utterances.*: b"),
        (lambda f: (f / "score").unlink(), "cannot read .*2best_recog/score"),
        (lambda f: (f / "text").write_text("a x\na y\n"), "text, line 2: a is there already"),
        (lambda f: (f / "text").write_bytes(b"a \xff\n"), "not UTF-8.*byte 0xff in line 1"),
    ],
)
def test_damaged_host_folders(host_folder, spoil, message):
    spoil(host_folder / "logdir/output.2/2best_recog")
    with pytest.raises(InputError, match=message):
        read_nbest(host_folder)


def test_an_utterance_of_two_jobs(host_folder):
    write_rank(host_folder / "logdir/output.11", 1, {"a": ("x", 1)})
    with pytest.raises(InputError, match="more than once: found a"):
        read_nbest(host_folder)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1 is no n-best list"),
        ('{"id": "a"}', "KeyError: 'hyps'"),
        ('{"id": "a", "hyps": [{"text": 3}]}', "no n-best list"),
        ('{"id": "a", "hyps": [{"text": "x", "score": 1}, {"text": "y"}]}', "lack a score"),
        ('{"id": "a", "hyps": [{"text": "x", "score": null}]}', "score nan of a"),
        ('{"id": "a", "hyps": [{"text": "x", "score": NaN}]}', "score nan of a"),
        ("", "has no utterance"),
    ],
)
def test_damaged_json_lines(tmp_path, line, message):
    path = tmp_path / "n.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=message):
        read_nbest(path)


def test_lists_with_other_scores(tmp_path):
    rows = [{"id": i, "hyps": [{"text": "x", "scores": {i: 1}}]} for i in "ab"]
    path = tmp_path / "n.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"same scores: found \['b'\] in b; expected \['a'\]"):
        read_nbest(path)


def test_what_is_no_nbest(tmp_path):
    with pytest.raises(InputError, match="there is no n-best"):
        read_nbest(tmp_path / "nothing")
    with pytest.raises(InputError, match="found an empty folder.*nbest: 10"):
        read_nbest(tmp_path)
