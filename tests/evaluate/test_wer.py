"""Word error counts: known alignments, real lists against their published rate."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.wer import WerCounts, align, count, wer

pytest.importorskip("kaldialign", reason="kaldialign is not installed")

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
        # Costs 4, 3, 3: keeping "a" costs 3 + 3, two substitutions would cost 8.
        ("a b", "b a", None),
    ],
)
def test_known_alignments(ref, hyp, steps):
    found = align(ref.split(), hyp.split())
    if steps is None:
        assert sorted(found) == ["C", "D", "I"]
    else:
        assert found == steps


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
