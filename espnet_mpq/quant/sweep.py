"""The breakpoint sweep: exact least-squares scale of a row of weights on a small grid.

As the scale a falls from infinity, the nearest level of a weight w changes only where w / a
crosses the middle m of two levels, that is at a = w / m, and always away from zero. Sorting
these events gives every possible nearest assignment q once, with A = sum w q and
B = sum q q as running sums; the best scale for one is A / B and leaves the error
sum w^2 - A^2 / B. The largest A^2 / B is therefore the global optimum.
Source: own (it generalises the exact ternary solution by a sort over |w|).
"""

from __future__ import annotations

from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch

from espnet_mpq.quant.grid import Grid

# Events of one row that are sorted in one go; rows with more are narrowed down first.
MAX_ROW_EVENTS = 1 << 20
N_BINS = 1 << 16
MAX_NARROWINGS = 5
PIECE = 1 << 18


def best_scale(w: torch.Tensor, grid: Grid, mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Scale of the global least-squares optimum for every row.

    Args:
        w: float32 (G, K), finite, of magnitude around 1 at most (squares must not overflow).
        grid: at most 16 levels; a row costs K events per pair of neighbouring levels.
        mask: bool (G, K), True where a weight counts; None: all do.

    Returns:
        float64 (G, 1), >= 0; 0 where no positive scale beats all-zero values.
    """
    sides = _sides(w, grid, mask)
    a, b = _start(w, sides)
    n_events = sum(magnitude.shape[1] * len(steps) for magnitude, _, steps, _ in sides)
    if not n_events:
        return _ratio(a, b)
    if n_events <= MAX_ROW_EVENTS:
        return _best_of_rows(sides, a, b)
    rows = [
        _best_of_wide_row([(m[i : i + 1], *rest) for m, *rest in sides], a[i], b[i])
        for i in range(w.shape[0])
    ]
    return torch.cat(rows)


# One side of zero: magnitudes (G, K) of its weights (0 elsewhere), the level nearest to zero,
# (middle, level step, step of the squared level) outwards, and how many weights it has.
Side = Tuple[torch.Tensor, int, List[Tuple[float, int, int]], torch.Tensor]


def _sides(w: torch.Tensor, grid: Grid, mask: Optional[torch.Tensor]) -> List[Side]:
    counts = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    if mask is not None:
        w = w * mask
    if grid.is_symmetric:
        magnitude, counts = w.abs(), counts.sum(1, keepdim=True)
        return [(magnitude, *_outwards(grid.levels), counts)]
    is_positive = w >= 0
    up = (w.clamp(min=0), *_outwards(grid.levels), (is_positive & counts).sum(1, keepdim=True))
    mirrored = [-level for level in reversed(grid.levels)]
    down = (
        (-w).clamp_(min=0),
        *_outwards(mirrored),
        (~is_positive & counts).sum(1, keepdim=True),
    )
    return [up, down]


def _outwards(levels: Sequence[int]) -> Tuple[int, List[Tuple[float, int, int]]]:
    """The level that small positive weights take, and the steps to the larger ones."""
    first = min(range(len(levels)), key=lambda k: (abs(levels[k]), -levels[k]))
    pairs = list(zip(levels[first:], levels[first + 1 :]))
    return levels[first], [((low + up) / 2, up - low, up * up - low * low) for low, up in pairs]


def _start(w: torch.Tensor, sides: Sequence[Side]) -> Tuple[torch.Tensor, torch.Tensor]:
    a = b = torch.zeros(w.shape[0], 1, dtype=torch.float64, device=w.device)
    for magnitude, level, _, counts in sides:
        a = a + level * magnitude.sum(1, keepdim=True, dtype=torch.float64)
        b = b + level * level * counts
    return a, b


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((a > 0) & (b > 0), a / b.clamp(min=1e-300), torch.zeros_like(a))


def _gain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A^2 / B where the scale A / B is positive, else 0."""
    return a.clamp(min=0).square_().div_(b.clamp(min=1e-300))


def _best_of_rows(sides: Sequence[Side], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sort all events of every row; a, b (G, 1) are the sums before the first."""
    # Sorting values alone is ten times as fast as sorting with indices. The low bits of a
    # ratio therefore say which pair of levels it belongs to (order exact to 2e-6), and the
    # weights of one pair, in falling order, fill the places where it occurs.
    keys, weights, steps_a, steps_b = [], [], [], []
    for magnitude, _, steps, _ in sides:
        magnitude = _sorted(magnitude)
        for middle, step, square_step in steps:
            tag = len(keys)
            keys.append(((magnitude / middle).view(torch.int32) & ~15) | tag)
            weights.append(magnitude)
            steps_a.append(step)
            steps_b.append(square_step)
    tags = _sorted(torch.cat(keys, 1).view(torch.float32)).view(torch.int32) & 15
    step_b = torch.tensor(steps_b, dtype=torch.float64, device=a.device)[tags.long()]
    step_a = torch.empty_like(tags, dtype=torch.float32)
    for tag, (weight, step) in enumerate(zip(weights, steps_a)):
        step_a.masked_scatter_(tags == tag, weight * step)
    return _best_of_sorted(a, b, step_a.double(), step_b)


def _best_of_sorted(a, b, step_a, step_b) -> torch.Tensor:
    a = torch.cat([a, step_a], 1).cumsum_(1)
    b = torch.cat([b, step_b], 1).cumsum_(1)
    best = _gain(a, b).argmax(dim=1, keepdim=True)
    return _ratio(a.gather(1, best), b.gather(1, best))


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """Rows of non-negative float32 in falling order."""
    if values.device.type != "cpu":
        return values.sort(dim=1, descending=True)[0]
    return torch.from_numpy(np.sort(-values.numpy(), axis=1)).neg_()


def _best_of_wide_row(sides: Sequence[Side], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """One row of millions of weights in bounded memory, still exact; a, b of shape (1,).

    Events are counted into bins of falling scale. An event at ratio r adds to A r / 2 times
    what it adds to B, so an assignment inside a bin (high to low, A0 to A1) has
    B >= B0 + 2 (A - A0) / high. With that A^2 / B is convex in A, so it is largest at the
    ends. Scales outside the bins that may beat the best edge are given up, and the rest is
    binned again until few events are left to sort.
    """
    low = 0.0
    # The smallest middle comes first on each side.
    high = max(float(side[0].max()) / side[2][0][0] for side in sides if side[2])
    for _ in range(MAX_NARROWINGS):
        width = (high - low) / N_BINS
        n_events, edges_a, edges_b = _count(sides, a, b, low, high)
        if n_events <= MAX_ROW_EVENTS or not width > 0:
            break
        highs = high - width * torch.arange(N_BINS, dtype=torch.float64, device=a.device)
        least_b = edges_b[:-1] + 2 * (edges_a[1:] - edges_a[:-1]) / highs.clamp(min=1e-30)
        gains = _gain(edges_a, edges_b)
        bound = torch.maximum(_gain(edges_a[1:], least_b), gains[:-1])
        # The margin covers the rounding of float32 ratios and of sums over millions of terms.
        is_open = (bound * (1 + 1e-6) >= gains.max()).nonzero()[:, 0]
        # One bin more on either side covers the rounding of the edges.
        low, high = (
            max(low, high - width * (int(is_open[-1]) + 2)),
            min(high, high - width * (int(is_open[0]) - 1)),
        )
    ratios, steps_a, steps_b = [], [], []
    for ratio, step_a, square_step in _event_pieces(sides):
        above, kept = ratio > high, (ratio > low) & (ratio <= high)
        a = a + step_a[above].sum(dtype=torch.float64)
        b = b + square_step * above.sum()
        ratios.append(ratio[kept])
        steps_a.append(step_a[kept])
        steps_b.append(torch.full_like(ratios[-1], square_step))
    order = torch.cat(ratios).argsort(descending=True)
    step_a, step_b = (torch.cat(steps)[order].double()[None] for steps in (steps_a, steps_b))
    return _best_of_sorted(a[None], b[None], step_a, step_b)


def _count(sides: Sequence[Side], a: torch.Tensor, b: torch.Tensor, low: float, high: float):
    """Events in (low, high], and A, B at the N_BINS + 1 edges from high down to low."""
    n_events = 0
    bins_a = torch.zeros(N_BINS, dtype=torch.float64, device=a.device)
    bins_b = torch.zeros_like(bins_a)
    for ratio, step_a, square_step in _event_pieces(sides):
        above = ratio > high
        a = a + step_a[above].sum(dtype=torch.float64)
        b = b + square_step * above.sum()
        kept = (ratio > low) & ~above
        ratio, step_a = ratio[kept], step_a[kept]
        n_events += len(ratio)
        index = (high - ratio).mul_(N_BINS / max(high - low, 1e-30)).long().clamp_(0, N_BINS - 1)
        bins_a += torch.bincount(index, step_a.double(), N_BINS)
        bins_b += square_step * torch.bincount(index, minlength=N_BINS)
    edges_a = torch.cat([a, a + bins_a.cumsum(0)])
    return n_events, edges_a, torch.cat([b, b + bins_b.cumsum(0)])


def _event_pieces(sides: Sequence[Side]) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
    """(ratios, steps of A, step of B) of some events of a single row."""
    for magnitude, _, steps, _ in sides:
        for piece in magnitude[0].split(PIECE):
            for middle, step, square_step in steps:
                yield piece / middle, piece * step, square_step
