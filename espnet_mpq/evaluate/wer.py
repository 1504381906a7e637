"""Word error rate: alignments and counts of substitutions, deletions and insertions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Iterable, List, Sequence

import numpy

from espnet_mpq.errors import InputError

CORRECT, SUBSTITUTION, DELETION, INSERTION = "C", "S", "D", "I"
SUB_COST, INDEL_COST = 4, 3


@dataclass(frozen=True)
class WerCounts:
    """Numbers of reference words and of errors; rates are in percent of reference words."""

    n_ref: int
    n_sub: int
    n_del: int
    n_ins: int

    @property
    def n_errors(self) -> int:
        return self.n_sub + self.n_del + self.n_ins

    @property
    def wer_percent(self) -> float:
        if self.n_ref:
            return 100.0 * self.n_errors / self.n_ref
        return float("inf") if self.n_errors else 0.0

    def __add__(self, other: "WerCounts") -> "WerCounts":
        return WerCounts(
            self.n_ref + other.n_ref,
            self.n_sub + other.n_sub,
            self.n_del + other.n_del,
            self.n_ins + other.n_ins,
        )


def align(ref: Sequence[str], hyp: Sequence[str]) -> str:
    """One letter a step of the alignment: C, S, D (word of ``ref`` missed) or I.

    Costs 4, 3, 3 for substitution, deletion, insertion. Of equally cheap alignments the one of
    NIST sclite is taken: read from the end, a pair of words before an insertion before a
    deletion. So counts and steps are what the host's scoring stage prints. Time and memory (one
    byte a cell) grow with len(ref) * len(hyp).
    """
    if ref == hyp:
        return CORRECT * len(ref)
    n_ref, n_hyp = len(ref), len(hyp)
    numbers: Dict[str, int] = {}
    ref_ids, hyp_ids = (
        numpy.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=numpy.int64)
        for words in (ref, hyp)
    )
    straight = INDEL_COST * numpy.arange(n_hyp + 1)  # cost of j insertions
    steps = numpy.full((n_ref + 1, n_hyp + 1), ord(INSERTION), dtype=numpy.uint8)
    steps[1:, 0] = ord(DELETION)
    above = straight
    for i, word in enumerate(ref_ids, start=1):
        wrong = hyp_ids != word
        paired = above[:-1] + SUB_COST * wrong
        row = above + INDEL_COST
        numpy.minimum(row[1:], paired, out=row[1:])
        # Insertions: the cheapest start to the left, j cells of INDEL_COST away.
        row = numpy.minimum.accumulate(row - straight) + straight
        here = steps[i, 1:]
        here[row[1:] != row[:-1] + INDEL_COST] = ord(DELETION)
        pairs = row[1:] == paired
        here[pairs] = numpy.where(wrong[pairs], ord(SUBSTITUTION), ord(CORRECT))
        above = row
    path = []
    i, j = n_ref, n_hyp
    while i or j:
        step = chr(steps[i, j])
        path.append(step)
        i -= step != INSERTION
        j -= step != DELETION
    return "".join(reversed(path))


def align_all(refs: Sequence[Sequence[str]], hyps: Sequence[Sequence[str]]) -> List[str]:
    """`align` for every utterance.

    Raises:
        InputError: lists of different lengths.
    """
    if len(refs) != len(hyps):
        raise InputError(
            "references and hypotheses differ in number",
            found=f"{len(hyps)} hypotheses",
            expected=f"{len(refs)}",
        )
    return [align(ref, hyp) for ref, hyp in zip(refs, hyps)]


def count(alignments: Iterable[str]) -> WerCounts:
    """Total counts of alignments written as by `align`."""
    joined = "".join(alignments)
    n_sub, n_del, n_ins = (joined.count(step) for step in (SUBSTITUTION, DELETION, INSERTION))
    return WerCounts(joined.count(CORRECT) + n_sub + n_del, n_sub, n_del, n_ins)


def wer(refs: Sequence[Sequence[str]], hyps: Sequence[Sequence[str]]) -> WerCounts:
    """Counts over all utterances; ``refs`` and ``hyps`` are lists of word lists in one order."""
    return count(align_all(refs, hyps))
