"""Word error rate: alignments and counts of substitutions, deletions and insertions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, List, Sequence

from espnet_mpq.errors import InputError

CORRECT, SUBSTITUTION, DELETION, INSERTION = "C", "S", "D", "I"


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


def need_kaldialign():
    """Import kaldialign.

    Raises:
        InputError: it is not installed.
    """
    try:
        import kaldialign
    except ImportError as error:
        raise InputError(
            "scoring needs the package kaldialign",
            found=error,
            todo="pip install 'espnet_mpq[evaluate]'",
        ) from error
    return kaldialign


def align(ref: Sequence[str], hyp: Sequence[str]) -> str:
    """One letter a step of the alignment: C, S, D (word of ``ref`` missed) or I.

    Costs 4, 3, 3 for substitution, deletion, insertion as in NIST sclite, so that
    counts agree with what the host's scoring stage prints.
    """
    if not hyp:
        return DELETION * len(ref)
    if not ref:
        return INSERTION * len(hyp)
    gap = ""  # never a word: words are split at blanks
    steps = []
    for r, h in need_kaldialign().align(ref, hyp, gap, sclite_mode=True):
        if r == gap:
            steps.append(INSERTION)
        elif h == gap:
            steps.append(DELETION)
        else:
            steps.append(CORRECT if r == h else SUBSTITUTION)
    return "".join(steps)


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
