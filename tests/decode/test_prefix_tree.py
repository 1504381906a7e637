"""Prefix trees: every prefix once, and the scores of the naive way."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_mpq.decode import prefix_tree
from espnet_mpq.decode.prefix_tree import build_tree, score_sequences
from espnet_mpq.runtime.rnn_lm import PackedRnn
from espnet_mpq.runtime.transformer_lm import PackedTransformer

from packed_models import architecture, mixed, packed_model, transformer  # isort: skip

V, SOS = 11, 10
SEQUENCES = st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=1, max_size=12)


class Counting:
    """An LM whose logits are a hash of the whole prefix, carried in its state; counts its steps."""

    def __init__(self):
        self.n_rows, self.largest = 0, 0

    def step(self, tokens, state):
        before = torch.zeros(1, len(tokens), 1, dtype=torch.long) if state is None else state
        after = (before * 31 + tokens[None, :, None] + 7) % 1000003
        self.n_rows += len(tokens)
        self.largest = max(self.largest, len(tokens))
        return self.log_probs(after[0, :, 0]), after

    @staticmethod
    def log_probs(hashes):
        logits = torch.sin(hashes[:, None] * torch.arange(1, V + 1)).double()
        return logits.log_softmax(-1)

    def naive(self, sequence):
        values, code = [], (SOS + 7) % 1000003
        for token in sequence:
            values.append(float(self.log_probs(torch.tensor([code]))[0, token]))
            code = (code * 31 + token + 7) % 1000003
        return values


def scores(lm, sequences):
    found = [None] * len(sequences)
    for numbers, values in score_sequences(lm, [numpy.array(s) for s in sequences], SOS):
        for i in numbers:
            assert found[i] is None
            found[i] = values
    return found


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 5), st.integers(1, 4))
def test_scores_of_the_naive_way_and_every_prefix_once(bodies, most_sequences, most_rows):
    sequences = [[*body, SOS] for body in bodies]
    lm = Counting()
    with pytest.MonkeyPatch.context() as patch:
        for found in (scores(lm, sequences), None):
            if found is None:  # again in many small pieces
                lm.n_rows = lm.largest = 0
                patch.setattr(prefix_tree, "MOST_SEQUENCES", most_sequences)
                patch.setattr(prefix_tree, "MOST_ROWS", most_rows)
                found = scores(lm, sequences)
                assert lm.largest <= most_rows
            else:
                prefixes = {tuple(s[:n]) for s in sequences for n in range(len(s))}
                assert lm.n_rows == len(prefixes)
            for sequence, values in zip(sequences, found):
                assert values.tolist() == pytest.approx(lm.naive(sequence), abs=1e-12)


def test_tree():
    tree = build_tree([[1, 2, 9], [1, 3, 9], [9], [1, 2, 9]])
    assert tree.tokens.tolist() == [-1, 1, 2, 9, 3, 9, 9]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 1, 4, 0]
    assert tree.depths.tolist() == [0, 1, 2, 3, 2, 3, 1]
    assert [path.tolist() for path in tree.paths] == [[1, 2, 3], [1, 4, 5], [6], [1, 2, 3]]


def random_sequences(seed=0):
    """Hypotheses like those of a list: common prefixes, of 0, 1, and 60 tokens."""
    rng = numpy.random.default_rng(seed)
    base = rng.integers(0, V - 1, 12)
    found = [[], [int(base[0])], rng.integers(0, V - 1, 60).tolist()]
    for _ in range(9):
        n = int(rng.integers(0, len(base)))
        found.append([*base[:n].tolist(), *rng.integers(0, V - 1, 5).tolist()])
    return [[*one, SOS] for one in found]


def naive_of(lm, sequence):
    """Step by step, one hypothesis at a time."""
    values, state = [], None
    for before, token in zip([SOS, *sequence[:-1]], sequence):
        log_probs, state = lm.step(torch.tensor([before]), state)
        values.append(float(log_probs[0, token]))
    return values


@pytest.mark.parametrize("path", ["kernels", "reference"])
@pytest.mark.parametrize(
    "arch",
    [
        architecture("lstm", V, 7, 9, 2),
        architecture("gru", V, 7, 7, 1),
        transformer(V),
        transformer(V, pos_enc="sinusoidal", att_unit=10, head=2, layer=1),
    ],
    ids=lambda arch: arch.describe(),
)
def test_packed_lms_equal_their_own_steps(arch, path, kernels, monkeypatch):
    if path == "reference":
        monkeypatch.setenv("MPQ_KERNEL", "reference")
    packed = packed_model(arch, mixed(arch, 3))
    lm = (PackedTransformer if hasattr(arch, "head") else PackedRnn)(arch, packed.plan)
    lm.load(packed)
    sequences = random_sequences()
    found = scores(lm, sequences)
    for sequence, values in zip(sequences, found):
        assert values.tolist() == pytest.approx(naive_of(lm, sequence), abs=1e-4)
    if path == "kernels" and arch.describe().startswith("lstm"):
        again = [naive_of(lm, sequence) for sequence in sequences]
        assert [values.tolist() for values in found] == again  # integer sums: bit for bit
    if hasattr(arch, "head"):  # pieces that hold less than a sequence, and one each
        monkeypatch.setattr(prefix_tree, "MOST_NODES", 8)
        for one, other in zip(found, scores(lm, sequences)):
            assert one.tolist() == pytest.approx(other.tolist(), abs=1e-5)


def test_memory_of_a_huge_list_is_bounded():
    """20,000 hypotheses of one list: never more states than a piece has."""
    rng = numpy.random.default_rng(1)
    sequences = [numpy.append(rng.integers(1, 4, 9), SOS) for _ in range(20000)]
    lm = Counting()
    n = 0
    for numbers, values in score_sequences(lm, sequences, SOS):
        n += len(numbers)
        assert len(values) == 10 and math.isfinite(values.sum())
    distinct = {tuple(s) for s in sequences}
    prefixes = {s[:n] for s in distinct for n in range(10)}
    n_pieces = -(-len(distinct) // prefix_tree.MOST_SEQUENCES)
    assert n == 20000 and lm.largest <= prefix_tree.MOST_ROWS
    # A border between pieces computes one path again.
    assert len(prefixes) <= lm.n_rows <= len(prefixes) + 10 * n_pieces
