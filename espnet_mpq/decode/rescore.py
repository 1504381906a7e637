"""Combines part scores into one total a hypothesis and puts n-best lists into its order."""

from __future__ import annotations

import dataclasses
import math
from typing import Dict, List, Mapping, Sequence

import numpy

from espnet_mpq.decode.nbest import NbestList
from espnet_mpq.decode.parts import LENGTH, Parts
from espnet_mpq.errors import InputError, near_matches


def combine(parts: Parts, weights: Mapping[str, float]) -> List[numpy.ndarray]:
    """Total of every hypothesis: the sum of weight times part; one float64 (n,) a list.

    A part without weight does not count.

    Raises:
        InputError: a weight for a part that is not there, or one that is no finite number.
    """
    for name, weight in weights.items():
        if name not in parts:
            raise InputError(f"a weight for {name!r}", todo=near_matches(name, parts))
        if not math.isfinite(weight):
            raise InputError(f"the weight of {name}", found=weight, expected="a finite number")
    n_lists = len(next(iter(parts.values())))
    totals = []
    for i in range(n_lists):
        total = numpy.zeros(len(parts[LENGTH][i]))
        for name, weight in weights.items():
            total += weight * parts[name][i]
        totals.append(total)
    return totals


def order_of(totals: numpy.ndarray) -> numpy.ndarray:
    """Hypotheses from the best to the worst; equal totals stay in the order they had."""
    return numpy.argsort(-totals, kind="stable")


@dataclasses.dataclass(frozen=True)
class Rescored:
    """One utterance in its new order.

    Attributes:
        nbest: the list as it was.
        order: int64 (n,): hypotheses of it, best first.
        totals: float64 (n,), in the order of ``nbest``.
        parts: part -> float64 (n,), in the order of ``nbest``.
    """

    nbest: NbestList
    order: numpy.ndarray
    totals: numpy.ndarray
    parts: Dict[str, numpy.ndarray]

    @property
    def best_text(self) -> str:
        """The transcript; "" where there was no hypothesis."""
        return self.nbest.texts[self.order[0]] if len(self.nbest) else ""

    def to_dict(self) -> dict:
        """JSON form, readable as an n-best list: hypotheses in the new order."""
        one = self.nbest
        hyps = []
        for i in self.order.tolist():
            hyp = {"text": one.texts[i], "score": float(self.totals[i])}
            if one.tokens is not None:
                hyp["token"] = one.tokens[i]
            hyp["first_pass_rank"] = i + 1
            hyp["parts"] = {name: float(values[i]) for name, values in self.parts.items()}
            hyps.append(hyp)
        return {"id": one.utt, **({} if one.ref is None else {"ref": one.ref}), "hyps": hyps}


def rescore(
    lists: Sequence[NbestList], parts: Parts, weights: Mapping[str, float]
) -> List[Rescored]:
    """Put every list into the order of its totals; errors as combine."""
    totals = combine(parts, weights)
    return [
        Rescored(one, order_of(total), total, {name: values[i] for name, values in parts.items()})
        for i, (one, total) in enumerate(zip(lists, totals))
    ]
