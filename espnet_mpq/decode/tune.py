"""Weights that make the fewest word errors on n-best lists: exact line searches, restarts."""

from __future__ import annotations

import dataclasses
import math
from typing import Callable, Dict, List, Sequence, Tuple

import numpy

from espnet_mpq.decode.parts import FIRST_PASS, LENGTH, LM, SOURCE, Scored
from espnet_mpq.errors import InputError

# Two totals nearer than this, in units of the larger, cross nowhere that floats can tell.
TINY = 1e-12
# A best interval without end is entered this far: half as far again as its only end, and 1.
BEYOND = 1.5
# Where the search begins, and the bounds: an LM helps, a source LM is subtracted.
STARTS = {LM: 0.4, SOURCE: -0.2, LENGTH: 0.0, FIRST_PASS: 1.0}
LOWS = {LM: 0.0, SOURCE: -math.inf, LENGTH: -math.inf, FIRST_PASS: 0.0}
HIGHS = {LM: math.inf, SOURCE: 0.0, LENGTH: math.inf, FIRST_PASS: math.inf}


@dataclasses.dataclass(frozen=True)
class Direction:
    """A line through weights: start + step * direction, for steps from low to high."""

    start: numpy.ndarray
    direction: numpy.ndarray
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        weights: float64 (n_parts,).
        n_errors: of the best hypotheses under them.
        n_lines: lines searched.
        starts: n_errors that each restart ended with.
    """

    weights: numpy.ndarray
    n_errors: int
    n_lines: int
    starts: List[int]


class ErrorSurface:
    """The errors of the best hypotheses of a corpus as a function of the weights.

    The best hypothesis of a list is the first one with the largest total, as rescoring chooses.

    Args:
        features: one float64 (n, n_parts) a list with hypotheses: the parts.
        errors: one int64 (n,) a list: word errors of every hypothesis.
        n_fixed: errors that no choice changes (lists without hypotheses).
    """

    def __init__(
        self,
        features: Sequence[numpy.ndarray],
        errors: Sequence[numpy.ndarray],
        n_fixed: int = 0,
    ):
        self.n_fixed = n_fixed
        # Lists of similar length together, padded with hypotheses that are never chosen.
        by_size: Dict[int, List[int]] = {}
        for i, one in enumerate(errors):
            by_size.setdefault(1 << (len(one) - 1).bit_length(), []).append(i)
        self.blocks = []
        for size, members in sorted(by_size.items()):
            n_parts = features[members[0]].shape[1]
            x = numpy.zeros((len(members), size, n_parts))
            e = numpy.zeros((len(members), size), dtype=numpy.int64)
            real = numpy.zeros((len(members), size), dtype=bool)
            for row, i in enumerate(members):
                n = len(errors[i])
                x[row, :n], e[row, :n], real[row, :n] = features[i], errors[i], True
            self.blocks.append((x, e, real))

    def n_errors(self, weights: numpy.ndarray) -> int:
        """Errors of the best hypotheses under some weights (n_parts,)."""
        total = self.n_fixed
        for x, e, real in self.blocks:
            best = numpy.where(real, x @ weights, -numpy.inf).argmax(axis=1)
            total += int(e[numpy.arange(len(e)), best].sum())
        return total

    def along(self, line: Direction) -> Tuple[numpy.ndarray, numpy.ndarray]:
        """The errors on a line: (edges, counts), counts[i] between edges[i] and edges[i + 1].

        Totals are straight lines in the step; the best of a list is their upper envelope, so the
        errors are constant between the crossings of envelopes. Source: Och 2003, "Minimum error
        rate training in statistical machine translation", section 4.

        Returns:
            float64 (n + 1,) rising, from low to high, and int64 (n,).
        """
        steps, changes, first = [], [], self.n_fixed
        for x, e, real in self.blocks:
            block = _envelope(x @ line.start, x @ line.direction, e, real, line.low, line.high)
            first += block[0]
            steps.append(block[1])
            changes.append(block[2])
        steps, changes = numpy.concatenate(steps), numpy.concatenate(changes)
        order = numpy.argsort(steps, kind="stable")
        edges, where = numpy.unique(steps[order], return_inverse=True)
        summed = numpy.bincount(where, weights=changes[order], minlength=len(edges))
        counts = first + numpy.concatenate([[0], numpy.cumsum(summed.astype(numpy.int64))])
        return numpy.concatenate([[line.low], edges, [line.high]]), counts


def _envelope(a, b, errors, real, low: float, high: float):
    """Errors at ``low`` and (step, change of errors) of every change of the best hypothesis.

    a, b: (lists, n), totals a + step * b; errors (lists, n); real (lists, n).
    """
    rows = numpy.arange(len(a))
    if math.isfinite(low):
        # Where two are equal at the start, the steeper one is best just behind it; then the first.
        at_low = numpy.where(real, a + low * b, -numpy.inf)
        top = at_low.max(axis=1, keepdims=True)
        near = at_low >= top - TINY * numpy.maximum(1.0, numpy.abs(top))
        best = numpy.where(near, b, -numpy.inf).argmax(axis=1)
    else:  # at minus infinity the flattest, of these the highest
        slopes = numpy.where(real, b, numpy.inf)
        flattest = slopes == slopes.min(axis=1, keepdims=True)
        best = numpy.where(flattest, a, -numpy.inf).argmax(axis=1)
    b = numpy.where(real, b, -numpy.inf)
    first = int(errors[rows, best].sum())
    steps, changes = [], []
    at = numpy.full(len(a), low)
    while len(rows):
        steeper = b[rows] > b[rows, best][:, None]
        with numpy.errstate(divide="ignore", invalid="ignore"):
            cross = (a[rows, best][:, None] - a[rows]) / (b[rows] - b[rows, best][:, None])
        cross = numpy.where(steeper, numpy.maximum(cross, at[:, None]), numpy.inf)
        step = cross.min(axis=1)
        goes_on = step < high
        rows, best, at, step, cross = (x[goes_on] for x in (rows, best, at, step, cross))
        if not len(rows):
            break
        # Of those that cross there, the steepest is best behind it.
        tied = cross <= (step + TINY * numpy.maximum(1.0, numpy.abs(step)))[:, None]
        following = numpy.where(tied, b[rows], -numpy.inf).argmax(axis=1)
        steps.append(step)
        changes.append(errors[rows, following] - errors[rows, best])
        best, at = following, step
    empty = numpy.zeros(0)
    return first, *(numpy.concatenate(x) if x else empty for x in (steps, changes))


def search_line(surface: ErrorSurface, line: Direction) -> Tuple[float, int]:
    """(step, errors): the middle of the widest stretch of a line with the fewest errors."""
    edges, counts = surface.along(line)
    fewest = counts.min()
    # Neighbours with as few errors are one stretch.
    good = numpy.flatnonzero(counts == fewest)
    runs = numpy.split(good, numpy.flatnonzero(numpy.diff(good) > 1) + 1)
    stretches = [(edges[run[0]], edges[run[-1] + 1]) for run in runs]
    low, high = max(stretches, key=lambda s: s[1] - s[0])
    return _middle(low, high), int(fewest)


def _middle(low: float, high: float) -> float:
    if math.isinf(low) and math.isinf(high):
        return 0.0
    if math.isinf(high):
        return max(low * BEYOND, low + 1.0)
    if math.isinf(low):
        return min(high * BEYOND, high - 1.0)
    return (low + high) / 2.0


def tune(
    surface: ErrorSurface,
    start: numpy.ndarray,
    lows: Sequence[float],
    highs: Sequence[float],
    *,
    n_restarts: int = 8,
    n_random: int = 4,
    seed: int = 0,
) -> Tuned:
    """Weights within bounds that make few errors: Powell's walk along exact line searches.

    Each pass searches along every weight that may move and ``n_random`` random directions, and
    goes the best of these ways, until none makes fewer errors. The first restart begins at
    ``start``, the others at random points between it and three times it, signs as the bounds
    allow. The result never makes more errors than ``start``.

    Args:
        start, lows, highs: (n_parts,); equal bounds keep a weight where it is.

    Raises:
        InputError: bounds that ``start`` does not keep, or that no weight may move in.
    """
    start, lows, highs = (numpy.asarray(x, dtype=float) for x in (start, lows, highs))
    free = numpy.flatnonzero(lows < highs)
    if (start < lows).any() or (start > highs).any() or not len(free):
        raise InputError(
            "weights to begin with", found=start.tolist(), expected="some within bounds"
        )
    rng = numpy.random.default_rng(seed)
    best, fewest, n_lines, ends = start, surface.n_errors(start), 0, []
    for restart in range(max(n_restarts, 1)):
        weights = start.copy()
        if restart:
            scale = numpy.maximum(numpy.abs(start[free]), 0.1)
            drawn = start[free] + rng.uniform(-1, 2, len(free)) * scale
            weights[free] = numpy.clip(drawn, lows[free], highs[free])
        n_errors = surface.n_errors(weights)
        while True:
            directions = list(numpy.eye(len(start))[free])
            for _ in range(n_random if len(free) > 1 else 0):
                direction = numpy.zeros(len(start))
                scale = numpy.maximum(numpy.abs(weights[free]), 0.1)
                direction[free] = rng.normal(size=len(free)) * scale
                directions.append(direction)
            found = []
            for direction in directions:
                line = within(weights, direction, lows, highs)
                if line.low < line.high:
                    step, count = search_line(surface, line)
                    found.append((count, len(found), weights + step * direction))
                    n_lines += 1
            count, _, moved = min(found, key=lambda x: x[:2])
            # Counted anew: rounding at an edge of the bounds may choose otherwise.
            moved = numpy.clip(moved, lows, highs)
            count = surface.n_errors(moved)
            if count >= n_errors:
                break
            weights, n_errors = moved, count
        ends.append(n_errors)
        if n_errors < fewest:
            best, fewest = weights, n_errors
    return Tuned(best, fewest, n_lines, ends)


def within(
    start: numpy.ndarray, direction: numpy.ndarray, lows: numpy.ndarray, highs: numpy.ndarray
) -> Direction:
    """The part of a line that keeps the bounds; ``start`` (step 0) keeps them."""
    low, high = -math.inf, math.inf
    for x, d, least, most in zip(start, direction, lows, highs):
        if d:
            ends = sorted(((least - x) / d, (most - x) / d))
            low, high = max(low, ends[0]), min(high, ends[1])
    return Direction(start, direction, low, high)


def tune_parts(
    scored: Scored,
    errors: Sequence[numpy.ndarray],
    n_fixed: int = 0,
    *,
    use_length: bool = True,
    n_restarts: int = 8,
    seed: int = 0,
) -> Tuple[Dict[str, float], Tuned]:
    """Weights of the parts of n-best lists; the first score of the first pass keeps weight 1.

    Args:
        errors: word errors of every hypothesis, int64 (n,) a list.
        n_fixed: errors that no choice changes.
    """
    names = [name for name in scored.parts if use_length or name != LENGTH]
    kinds = [scored.kinds[name].kind for name in names]
    start, lows, highs = ([of[kind] for kind in kinds] for of in (STARTS, LOWS, HIGHS))
    if FIRST_PASS in kinds:
        lows[kinds.index(FIRST_PASS)] = highs[kinds.index(FIRST_PASS)] = 1.0
    filled = [i for i, one in enumerate(errors) if len(one)]
    features = [numpy.stack([scored.parts[n][i] for n in names], axis=1) for i in filled]
    surface = ErrorSurface(features, [errors[i] for i in filled], n_fixed)
    tuned = tune(surface, start, lows, highs, n_restarts=n_restarts, seed=seed)
    return dict(zip(names, tuned.weights.tolist())), tuned


def word_errors(
    texts: Sequence[str],
    ref: Sequence[str],
    tokens: Callable[[Sequence[str]], List[str]],
    align: Callable[[Sequence[str], Sequence[str]], str],
) -> numpy.ndarray:
    """Word errors of hypotheses, int64 (n,).

    Args:
        ref: tokens of the reference.
        tokens: words -> tokens that are aligned (evaluate.scoring.Scoring.tokens).
        align: (reference, hypothesis) -> a letter a step, "C" where it is right; both are those
            of evaluate, so that what is tuned is what `mpq compare` reports.
    """
    known: Dict[str, int] = {}
    for text in texts:
        if text not in known:
            known[text] = sum(step != "C" for step in align(ref, tokens(text.split())))
    return numpy.array([known[text] for text in texts], dtype=numpy.int64)
