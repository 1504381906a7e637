"""Word error counts: known alignments, real lists against their published rate."""

import gzip
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nist import run_sclite, scores, write_trn

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.wer import WerCounts, align, count, wer

words = st.lists(st.sampled_from(["a", "b", "c", "<eps>", "*"]), max_size=7)


@pytest.mark.parametrize(
    "ref, hyp, steps",
    [
        ("a b c", "a b c", "CCC"),
        ("a b c", "a x c", "CSC"),
        ("a b c", "a c", "CDC"),
        ("a c", "a b c", "CIC"),
        ("", "a b", "II"),
        ("a b", "", "DD"),
        ("", "", ""),
        # Costs 4, 3, 3: keeping "b" costs 3 + 3, two substitutions would cost 8.
        ("a b", "b a", "DCI"),
        # Three substitutions cost as much as two deletions and two insertions.
        ("x y c", "c p q", "SSS"),
        ("a", "c b", "IS"),
        ("b a d c a a c", "c c a d a", "DDSCCICD"),  # as sclite 2.10 aligns it
    ],
)
def test_known_alignments(ref, hyp, steps):
    assert align(ref.split(), hyp.split()) == steps


def reference_cost(ref, hyp):
    """Weighted edit cost by the textbook recursion."""
    row = [3 * j for j in range(len(hyp) + 1)]
    for i, r in enumerate(ref, start=1):
        above, row = row, [3 * i]
        for j, h in enumerate(hyp, start=1):
            row.append(min(above[j - 1] + 4 * (r != h), above[j] + 3, row[j - 1] + 3))
    return row[-1]


@given(words, words)
def test_alignment_is_complete_and_cheapest(ref, hyp):
    counts = count([align(ref, hyp)])
    assert counts.n_ref == len(ref)
    assert counts.n_ref - counts.n_del + counts.n_ins == len(hyp)
    assert 4 * counts.n_sub + 3 * (counts.n_del + counts.n_ins) == reference_cost(ref, hyp)


def test_same_steps_as_sclite(tmp_path):
    """Many ties: 1500 random pairs of short lines over four words."""
    rng = random.Random(5)

    def line():
        return " ".join(rng.choices("abcd", k=rng.randint(1, 9)))

    lines = [(line(), line()) for _ in range(1500)]
    utts = [f"s-{number}" for number in range(len(lines))]
    write_trn(tmp_path / "ref.trn", utts, [ref for ref, _ in lines])
    write_trn(tmp_path / "hyp.trn", utts, [hyp for _, hyp in lines])
    theirs = scores(run_sclite(tmp_path))
    for utt, (ref, hyp) in zip(utts, lines):
        steps = align(ref.split(), hyp.split())
        assert theirs[utt] == tuple(map(steps.count, "CSDI")), (ref, hyp)


def test_long_lines_take_no_long(data_root):
    """3,000 characters against as many take seconds in plain Python."""
    path = data_root / "nbest_librispeech_espnet" / "dev_clean.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(40)]
    ref = list(" ".join(row["ref"] for row in rows))[:3000]
    hyp = list(" ".join(row["hyps"][1]["text"] for row in rows))[:3000]
    counts = count([align(ref, hyp)])
    assert counts.n_ref == 3000 and 0 < counts.n_errors < 1000


def test_counts_add_up():
    total = WerCounts(10, 1, 2, 3) + WerCounts(2, 0, 0, 0)
    assert total == WerCounts(12, 1, 2, 3)
    assert total.n_errors == 6 and total.wer_percent == 50.0


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(InputError, match="differ in number"):
        wer([["a"]], [])


@pytest.mark.parametrize(
    "name, n_ref, wer_percent",
    [("dev_clean", 54402, 6.12), ("dev_other", 50948, 16.76), ("test_clean", 52576, 6.42)],
)
def test_librispeech_one_best(data_root, name, n_ref, wer_percent):
    path = data_root / "nbest_librispeech_espnet" / f"{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    counts = wer([r["ref"].split() for r in rows], [r["hyps"][0]["text"].split() for r in rows])
    assert counts.n_ref == n_ref
    assert counts.wer_percent == pytest.approx(wer_percent, abs=0.02)
