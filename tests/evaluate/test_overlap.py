"""Overlap of test sets with a text: against a naive search, and known answers on real books."""

import random
import re
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espnet_mpq.bin import mpq
from espnet_mpq.bin.overlap import measure
from espnet_mpq.decode.nbest import read_nbest
from espnet_mpq.errors import InputError
from espnet_mpq.evaluate import overlap as module
from espnet_mpq.evaluate.overlap import overlap
from espnet_mpq.evaluate.scoring import AS_HOST
from espnet_mpq.io import read_json, read_lines

WORDS = st.lists(st.sampled_from("abc"), max_size=9)


def naive(test, lines, n, min_words):
    """(long and short sentences found, n-grams found, words covered), by comparing everything."""
    n_long = n_short = n_found = n_covered = 0
    for words in test.values():
        if words and words in lines:
            n_long += len(words) >= min_words
            n_short += len(words) < min_words
        covered = set()
        for k in range(len(words) - n + 1):
            ngram = words[k : k + n]
            if any(ngram == x[i : i + n] for x in lines for i in range(len(x) - n + 1)):
                n_found += 1
                covered.update(range(k, k + n))
        n_covered += len(covered)
    return n_long, n_short, n_found, n_covered


@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, max_size=8), st.integers(1, 4))
def test_as_a_naive_search(tests, lines, n):
    test = {f"u{k}": words for k, words in enumerate([*tests, ["a"]])}
    before, module.CHUNK_N_WORDS = module.CHUNK_N_WORDS, 12  # several chunks
    try:
        places = [(("f", k), line) for k, line in enumerate(lines)]
        found, searched = overlap(test, places, n=n, min_words=3)
    finally:
        module.CHUNK_N_WORDS = before
    ours = (
        found.n_found_sentences,
        found.n_found_short_sentences,
        found.n_found_ngrams,
        found.n_covered_words,
    )
    assert ours == naive(test, lines, n, 3)
    for ngram, (_, k) in searched.ngrams.items():  # the first line that has it
        has = [any(tuple(x[i : i + n]) == ngram for i in range(len(x))) for x in lines]
        assert has.index(True) == k


def test_colliding_hashes_are_compared_word_by_word(monkeypatch):
    monkeypatch.setattr(module, "_BASE", 1)  # a hash that knows no order
    found, _ = overlap({"u": "a b c".split()}, [(("f", 1), "c b a".split())], n=3)
    assert found.n_found_ngrams == 0 and found.n_ngrams == 1


@pytest.fixture
def files(tmp_path):
    (tmp_path / "test").write_text(
        "u-1 Yes\nu-2 the cat sat on the mat\n"
        "u-3 a b c d e f g h i\nu-4 never seen before in life\n"
    )
    (tmp_path / "lm.txt").write_text("yes\nTHE CAT SAT ON THE MAT\nx a b c d e f g h y\nother\n")
    return tmp_path


def test_command_prints_counts_and_stops_recipes(files, capsys):
    words = ["overlap", "--test", f"t={files}/test", "--text", f"{files}/lm.txt"]
    out = files / "o.json"
    assert mpq.main([*words, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "t: 1 of 3 sentences (33.3 %) are lines of the text" in printed
    assert "not under the limits: 1 of 1" in printed
    assert "1 of 2 8-grams (50 %) occur in it, in 1 sentences; they cover 8 of 21 words" in printed
    assert f"u-3: 8 of 9 words a b c d e f g h\n      {files}/lm.txt, line 3" in printed
    one = read_json(out)["tests"]["t"]
    assert [(x["utt"], x["place"][1]) for x in one["sentences"]] == [("u-2", 2), ("u-3", 3)]
    assert mpq.main([*words, "--fail_above", "50"]) == 0
    assert mpq.main([*words, "--fail_above", "49"]) == 3
    assert "50 % of the 8-grams of t, limit 49 %" in capsys.readouterr().out
    assert mpq.main([*words, "--max_sentences", "1"]) == 0
    assert mpq.main([*words, "--max_sentences", "0"]) == 3
    assert mpq.main([*words, "--case_sensitive", "--max_sentences", "0"]) == 0
    assert mpq.main([*words, "--fail_above", "101"]) == 1


def test_names_of_utterances_are_no_words(files):
    lines = "".join(f"spk-{k} the cat sat on the mat {k}\n" for k in range(30))
    (files / "kaldi").write_text(lines + "spk-x the cat sat on the mat\n")
    result = measure({"t": files / "test"}, [files / "kaldi"])
    assert result["tests"]["t"]["n_found_sentences"] == 1
    with pytest.raises(InputError, match="has no word"):
        (files / "empty").write_text("\n")
        measure({"t": files / "test"}, [files / "empty"])


def test_gutenberg_text_is_clean(data_root):
    """Its README: no 8-gram of these references; four sentences of five words or more are there."""
    folder = data_root / "nbest_librispeech_espnet"
    sets = {s: folder / f"{s}.jsonl.gz" for s in ("dev_clean", "dev_other", "test_clean")}
    found = measure(sets, [data_root / "gutenberg_lm" / "train.txt.xz"])
    assert found["text"] == {"n_lines": 294424, "n_words": 5517094}
    assert [one["n_found_ngrams"] for one in found["tests"].values()] == [0, 0, 0]
    assert [one["n_found_sentences"] for one in found["tests"].values()] == [1, 1, 2]


def test_planted_sentences_are_found(data_root, tmp_path):
    """References hidden in a real book, whole and in longer lines: all of them, nothing else."""
    lists = read_nbest(data_root / "nbest_librispeech_espnet" / "test_clean.jsonl.gz")
    chosen = [one for one in lists if 9 <= len(one.ref.split()) <= 20][:40]
    lines = read_lines(data_root / "gutenberg_lm" / "valid.txt.gz")
    rng = random.Random(0)
    for k, one in enumerate(chosen):
        line = one.ref.lower() if k % 2 else f"he said {one.ref} and so on"
        lines.insert(rng.randrange(len(lines)), line)
    (tmp_path / "lm.txt").write_text("\n".join(lines) + "\n")
    path = data_root / "nbest_librispeech_espnet" / "test_clean.jsonl.gz"
    found = measure({"t": path}, [tmp_path / "lm.txt"])["tests"]["t"]
    assert {x["utt"] for x in found["sentences"] if x["n_ngrams"]} == {x.utt for x in chosen}
    whole = {x["utt"] for x in found["sentences"] if x["whole"] and x["n_ngrams"]}
    assert whole == {one.utt for k, one in enumerate(chosen) if k % 2}
    assert found["n_found_ngrams"] == sum(len(one.ref.split()) - 7 for one in chosen)


def test_removed_sentences_are_in_the_raw_books(data_root):
    """books.tsv: sentences of this book were taken out for their 8-grams; the raw book has them."""
    with tarfile.open(data_root / "gutenberg_lm" / "raw_books.tar.xz") as tar:
        member = next(m for m in tar if "the-jungle" in m.name)
        raw = tar.extractfile(member).read().decode("utf-8")
    words = re.findall(r"[a-z']+", raw.lower())
    folder = data_root / "nbest_librispeech_espnet"
    sets = ("dev_clean", "dev_other", "test_clean")
    refs = {
        one.utt: AS_HOST.tokens(one.ref.split())
        for s in sets
        for one in read_nbest(folder / f"{s}.jsonl.gz")
    }
    found, _ = overlap(refs, [(("book", 1), words)])
    ngrams = {tuple(words[k : k + 8]) for k in range(len(words) - 7)}
    pieces = {utt: [tuple(ref[k : k + 8]) for k in range(len(ref))] for utt, ref in refs.items()}
    expected = {utt for utt, found in pieces.items() if any(x in ngrams for x in found)}
    assert expected and {x.utt for x in found.sentences if x.n_ngrams} == expected
