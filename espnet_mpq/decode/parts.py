"""The parts that the total of a hypothesis is made of: first pass, LMs, length."""

from __future__ import annotations

import dataclasses
import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy

from espnet_mpq.decode.nbest import NbestList
from espnet_mpq.decode.part_scores import HypothesisScore
from espnet_mpq.errors import InputError

# Kinds of parts; a source LM is subtracted (density ratio). LENGTH is also the name of its part.
FIRST_PASS, LM, SOURCE, LENGTH = "first pass", "lm", "source", "length"

# part -> one float64 (n,) a list
Parts = Dict[str, List[numpy.ndarray]]


@dataclasses.dataclass
class Part:
    """What a part is.

    Attributes:
        kind: FIRST_PASS, LM, SOURCE or LENGTH.
        identity: of the LM, as JSON; {} for the others.
    """

    kind: str
    identity: dict = dataclasses.field(default_factory=dict)


class Scored:
    """Part scores of n-best lists.

    Attributes:
        parts: part -> one float64 (n,) a list.
        kinds: part -> what it is.
        speed: LM -> milliseconds a hypothesis, of what was not in the journal.
    """

    def __init__(self, parts: Parts, kinds: Dict[str, Part]):
        self.parts, self.kinds = parts, kinds
        self.speed: Dict[str, float] = {}
        self.mixed: Optional[Tuple[str, str]] = None  # names of the LM and the n-gram LM
        self._words: Dict[str, list] = {}

    def add(self, name: str, values: list, kind: str, identity: dict) -> None:
        """One more part: float64 (n,) a list."""
        self.parts[name], self.kinds[name] = values, Part(kind, identity)

    def keep_words(self, name: str, scores: list) -> None:
        """Scores of words of an LM, to be mixed."""
        self._words[name] = scores

    def with_share(self, share: Optional[float]) -> "Scored":
        """With one mixed part in place of the LM and the n-gram LM; itself without a share."""
        if share is None or self.mixed is None:
            return self
        lm, ngram = self.mixed
        name = f"{lm}+{ngram}"
        both = zip(self._words[lm], self._words[ngram])
        parts = {k: v for k, v in self.parts.items() if k not in self.mixed}
        kinds = {k: v for k, v in self.kinds.items() if k not in self.mixed}
        parts[name] = [interpolate(one, other, share) for one, other in both]
        identity = {"lm": self.kinds[lm].identity, "ngram": self.kinds[ngram].identity}
        kinds[name] = Part(LM, identity)
        made = Scored(parts, kinds)
        made.speed = self.speed
        return made


def first_pass_parts(lists: Sequence[NbestList], score: str = "sum") -> Scored:
    """What the lists themselves say: their scores and the lengths.

    Args:
        score: of the lists' scores: "sum" over a hypothesis, "mean" per token (then multiplied by
            the length), or "rank": not there; minus the rank stands for it.

    Raises:
        InputError: lists without scores, for "sum" and "mean".
    """
    filled = [one for one in lists if len(one)]
    names = list(filled[0].scores) if filled else []
    if score == "rank":
        parts = {"rank": [-numpy.arange(len(one), dtype=float) for one in lists]}
    elif not names and filled:
        raise InputError(
            "the n-best lists have no scores",
            expected="a score of the first pass for every hypothesis",
            todo="give --score rank to use their order instead",
        )
    else:
        empty = numpy.zeros(0)
        parts = {name: [one.scores.get(name, empty) for one in lists] for name in names}
        if score == "mean":
            parts = {
                name: [x * one.lengths() for x, one in zip(values, lists)]
                for name, values in parts.items()
            }
    if LENGTH in parts:
        raise InputError(f"a score of the n-best lists is called {LENGTH!r}, which is ours")
    scored = Scored(parts, {name: Part(FIRST_PASS) for name in parts})
    scored.add(LENGTH, [one.lengths() for one in lists], LENGTH, {})
    return scored


def interpolate(
    one: Sequence[HypothesisScore], other: Sequence[HypothesisScore], share: float
) -> numpy.ndarray:
    """Log-probabilities of hypotheses where every word has share * p_one + (1 - share) * p_other.

    Args:
        one, other: with scores of words; of the same hypotheses.
        share: from 0 to 1.

    Source: linear interpolation of LMs word by word, Jelinek and Mercer 1980; with a share of 0.5
    the rescoring of Xu et al. 2021.
    """
    log_share = math.log(share) if share > 0 else -math.inf
    log_rest = math.log1p(-share) if share < 1 else -math.inf
    return numpy.array(
        [
            numpy.logaddexp(log_share + numpy.array(x.words), log_rest + numpy.array(y.words)).sum()
            for x, y in zip(one, other)
        ],
        dtype=float,
    )
