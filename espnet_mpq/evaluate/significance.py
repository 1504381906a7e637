"""Is a difference in word errors real, or small enough? MAPSSWE, equivalence, paired bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import numpy

from espnet_mpq.errors import InputError
from espnet_mpq.evaluate.wer import CORRECT, INSERTION, align_all, count

MIN_GOOD = 2


@dataclass(frozen=True)
class Mapsswe:
    """Matched-pairs test: statistics of (errors of A - errors of B) over segments."""

    n_segments: int
    mean_difference: float
    std_dev: float
    z: float
    p_value: float
    min_good: int = MIN_GOOD


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of WER(B) - WER(A) against a margin, in percent absolute.

    Attributes:
        p_not_worse: of the hypothesis that B is worse by the margin or more; small: it is not.
        p_not_better: of the hypothesis that B is better by the margin or more.
        p_value: the larger of both; small: the systems are equivalent within the margin.
    """

    margin_percent: float
    difference_percent: float
    p_not_worse: float
    p_not_better: float

    @property
    def p_value(self) -> float:
        return max(self.p_not_worse, self.p_not_better)


@dataclass(frozen=True)
class BootstrapInterval:
    """Confidence interval of WER(B) - WER(A) in percent, and how B did in the draws.

    The shares of draws in which B had fewer, as many and more errors add up to 1.
    """

    difference_percent: float
    low_percent: float
    high_percent: float
    confidence: float
    probability_b_better: float
    probability_equal: float
    probability_b_worse: float
    n_replications: int
    seed: int


def segments(steps_a: str, steps_b: str, min_good: int = MIN_GOOD) -> List[Tuple[int, int]]:
    """Split one utterance into segments with errors, separated by good stretches.

    A good stretch is at least ``min_good`` reference words in a row that both systems
    have right with no insertion between them; the ends of the utterance separate too.
    ``steps_a`` and ``steps_b`` are alignments of two hypotheses with the same reference,
    as by `wer.align`.

    Returns:
        (errors of A, errors of B) for each segment; never (0, 0).

    Source: Gillick and Cox, "Some statistical issues in the comparison of speech
    recognition algorithms", ICASSP 1989, with the rule of NIST sc_stats. One difference:
    an insertion of B after the last reference word counts here, sc_stats looks at those
    of the first system only.

    Raises:
        InputError: the two alignments are not of the same reference.
    """
    slots_a, slots_b = _slots(steps_a), _slots(steps_b)
    if len(slots_a) != len(slots_b):
        raise InputError(
            "the two alignments are of different references",
            found=f"{len(slots_a) - 1} and {len(slots_b) - 1} reference words",
        )
    found = []
    errors_a = errors_b = n_good = 0
    for (n_ins_a, wrong_a), (n_ins_b, wrong_b) in zip(slots_a, slots_b):
        if n_ins_a or n_ins_b:
            n_good = 0
        errors_a += n_ins_a + wrong_a
        errors_b += n_ins_b + wrong_b
        n_good = 0 if wrong_a or wrong_b else n_good + 1
        if n_good == min_good and (errors_a or errors_b):
            found.append((errors_a, errors_b))
            errors_a = errors_b = 0
    if errors_a or errors_b:
        found.append((errors_a, errors_b))
    return found


def mapsswe(
    refs: Sequence[Sequence[str]],
    hyps_a: Sequence[Sequence[str]],
    hyps_b: Sequence[Sequence[str]],
    min_good: int = MIN_GOOD,
) -> Mapsswe:
    """Matched-pairs sentence-segment word-error test, two-sided.

    ``refs``, ``hyps_a``, ``hyps_b``: word lists in the same order of utterances.
    """
    return mapsswe_of_alignments(align_all(refs, hyps_a), align_all(refs, hyps_b), min_good)


def mapsswe_of_alignments(
    alignments_a: Sequence[str], alignments_b: Sequence[str], min_good: int = MIN_GOOD
) -> Mapsswe:
    """`mapsswe` for alignments already made by `wer.align_all`.

    Z = mean / (std / sqrt(n)) with the n - 1 variance; p from the standard normal. Where
    all differences are equal Z does not exist: zero differences give p = 1, others the
    exact two-sided sign-flip probability 2^(1 - n).
    """
    pairs = [pair for a, b in zip(alignments_a, alignments_b) for pair in segments(a, b, min_good)]
    n = len(pairs)
    differences = numpy.array([a - b for a, b in pairs], dtype=float)
    mean = float(differences.mean()) if n else 0.0
    std_dev = float(differences.std(ddof=1)) if n > 1 else 0.0
    if std_dev > 0:
        z = mean / (std_dev / math.sqrt(n))
        p_value = math.erfc(abs(z) / math.sqrt(2.0))
    else:
        z = 0.0
        p_value = 2.0 ** (1 - n) if mean else 1.0
    return Mapsswe(n, mean, std_dev, z, p_value, min_good)


def equivalence(test: Mapsswe, n_ref: int, margin_percent: float) -> Equivalence:
    """Whether two systems differ by less than a margin, on the matched pairs of `mapsswe`.

    The sum of the differences over segments has the standard error std_dev * sqrt(n); where all
    differences are equal and not 0, their root mean square stands for the deviation. No segment
    at all: no difference, p = 0. Source: Schuirmann 1987 (two one-sided tests), normal
    approximation.

    Args:
        n_ref: reference words of the test set.
        margin_percent: of the word error rate, absolute.

    Raises:
        InputError: no reference word, or a margin that is not above 0.
    """
    if n_ref < 1 or not 0.0 < margin_percent < math.inf:
        raise InputError(
            "an equivalence test",
            found=f"{n_ref} reference words, margin {margin_percent}",
            expected="words, and a margin above 0 percent",
        )
    n = test.n_segments
    more_errors, margin = -test.mean_difference * n, margin_percent / 100.0 * n_ref
    error = (test.std_dev or abs(test.mean_difference)) * math.sqrt(n)
    found = []
    for room in (margin - more_errors, margin + more_errors):
        if error > 0:
            found.append(0.5 * math.erfc(room / error / math.sqrt(2.0)))
        else:
            found.append(0.0)
    return Equivalence(margin_percent, 100.0 * more_errors / n_ref, *found)


def bootstrap_difference(
    alignments_a: Sequence[str],
    alignments_b: Sequence[str],
    n_replications: int = 10000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapInterval:
    """Percentile interval of WER(B) - WER(A), utterances drawn with replacement.

    Both systems get the same draws (paired). Source: Bisani and Ney, "Bootstrap
    estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
    Memory is bounded by drawing in pieces.

    Raises:
        InputError: no reference word, or a bad ``n_replications``, ``seed`` or ``confidence``.
    """
    if n_replications < 1 or seed < 0 or not 0.0 < confidence < 1.0:
        raise InputError(
            "bootstrap options",
            found=f"n_replications {n_replications}, seed {seed}, confidence {confidence}",
            expected="n_replications >= 1, seed >= 0 and confidence between 0 and 1",
        )
    counts_a = [count([steps]) for steps in alignments_a]
    counts_b = [count([steps]) for steps in alignments_b]
    n_ref = numpy.array([c.n_ref for c in counts_a], dtype=float)
    if n_ref.sum() == 0:
        raise InputError("the reference has no word", found=f"{len(n_ref)} empty transcripts")
    errors_a = numpy.array([c.n_errors for c in counts_a], dtype=float)
    errors_b = numpy.array([c.n_errors for c in counts_b], dtype=float)
    # An utterance enters the differences as a whole, so one vector carries both systems.
    excess = errors_b - errors_a

    generator = numpy.random.default_rng(seed)
    n_utts = len(n_ref)
    piece = max(1, 2_000_000 // n_utts)
    drawn = []
    for start in range(0, n_replications, piece):
        shape = (min(piece, n_replications - start), n_utts)
        picks = generator.integers(0, n_utts, size=shape)
        # A draw of empty references only has no rate; one word keeps it finite.
        words = numpy.maximum(n_ref[picks].sum(axis=1), 1.0)
        drawn.append(100.0 * excess[picks].sum(axis=1) / words)
    differences = numpy.concatenate(drawn)
    tail = 50.0 * (1.0 - confidence)
    low, high = numpy.percentile(differences, [tail, 100.0 - tail])
    return BootstrapInterval(
        difference_percent=float(100.0 * excess.sum() / n_ref.sum()),
        low_percent=float(low),
        high_percent=float(high),
        confidence=confidence,
        probability_b_better=float((differences < 0).mean()),
        probability_equal=float((differences == 0).mean()),
        probability_b_worse=float((differences > 0).mean()),
        n_replications=n_replications,
        seed=seed,
    )


def _slots(steps: str) -> List[Tuple[int, int]]:
    """For each reference word and for the end: (insertions before it, 1 if it is wrong)."""
    slots = []
    n_ins = 0
    for step in steps:
        if step == INSERTION:
            n_ins += 1
        else:
            slots.append((n_ins, int(step != CORRECT)))
            n_ins = 0
    return slots + [(n_ins, 0)]
