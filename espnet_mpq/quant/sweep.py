"""The breakpoint sweep: exact least-squares scale of a row of weights on a small grid.

As the scale a falls from infinity, the nearest level of a weight w changes only where w / a
crosses the middle m of two levels, that is at a = w / m, and always away from zero. Sorting
these events gives every possible nearest assignment q once, with A = sum w q and
B = sum q q as running sums; the best scale for one is A / B and leaves the error
sum w^2 - A^2 / B. The largest A^2 / B is therefore the global optimum.
Source: own (it generalises the exact ternary solution by a sort over |w|).
"""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch

from espnet_mpq.quant.grid import Grid

# Events of one row that are sorted in one go; more are first thinned out in bins.
MAX_ROW_EVENTS = 1 << 20
N_BINS = 1 << 15
PIECE = 1 << 18


def best_scale(
    w: torch.Tensor, grid: Grid, mask: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Scale of the global least-squares optimum for every row.

    Args:
        w: float32 (G, K), finite, of magnitude around 1 at most (squares must not overflow).
        grid: any grid of few levels; a row costs K events per pair of neighbouring levels.
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
        ratio, step_a, step_b = _events(sides)
        return _best(a, b, ratio, step_a, step_b)
    return torch.cat(
        [
            _best_of_wide_row([(m[i : i + 1], *rest) for m, *rest in sides], a[i], b[i])
            for i in range(w.shape[0])
        ]
    )


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


def _events(sides: Sequence[Side]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ratio float32, steps of A float32, steps of B float32), each (G, n_events), unsorted."""
    ratio, step_a, step_b = [], [], []
    for magnitude, _, steps, _ in sides:
        for middle, step, square_step in steps:
            ratio.append(magnitude / middle)
            step_a.append(magnitude * step)
            step_b.append(torch.full_like(magnitude, square_step))
    return torch.cat(ratio, 1), torch.cat(step_a, 1), torch.cat(step_b, 1)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where((a > 0) & (b > 0), a / b.clamp(min=1e-300), torch.zeros_like(a))


def _gain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A^2 / B where the scale A / B is positive, else 0."""
    return a * _ratio(a, b)


def _best(a, b, ratio, step_a, step_b) -> torch.Tensor:
    order = ratio.argsort(dim=1, descending=True)
    step_a = step_a.gather(1, order).double()
    step_b = step_b.gather(1, order).double()
    a = torch.cat([a, step_a], 1).cumsum_(1)
    b = torch.cat([b, step_b], 1).cumsum_(1)
    best = _gain(a, b).argmax(dim=1, keepdim=True)
    return _ratio(a.gather(1, best), b.gather(1, best))


def _best_of_wide_row(
    sides: Sequence[Side], a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """One row of millions of weights in bounded memory, still exact.

    The events are counted into bins of falling scale. A and B only grow, so no assignment
    inside a bin gains more than (A at its low edge)^2 / (B at its high edge); bins that
    cannot beat the best edge become one event each, the others are sorted.
    """
    edges = _bin_edges(sides)
    n_bins = len(edges) + 1
    bin_a = torch.zeros(n_bins, dtype=torch.float64, device=a.device)
    bin_b = torch.zeros_like(bin_a)
    for ratio, step_a, step_b in _event_pieces(sides):
        index = _bin_of(ratio, edges)
        bin_a += torch.bincount(index, step_a.double(), n_bins)
        bin_b += step_b * torch.bincount(index, minlength=n_bins)
    after_a, after_b = a + bin_a.cumsum(0), b + bin_b.cumsum(0)
    before_b = torch.cat([b, after_b[:-1]])
    bound = after_a.clamp(min=0).square() / before_b.clamp(min=1e-300)
    # The margin covers the rounding of sums over millions of terms.
    is_open = bound * (1 + 1e-9) >= torch.cat([_gain(a, b), _gain(after_a, after_b)]).max()
    high = torch.cat([torch.full_like(edges[:1], float("inf")), edges])
    parts = [(high[~is_open], bin_a[~is_open], bin_b[~is_open])]
    for ratio, step_a, step_b in _event_pieces(sides):
        kept = is_open[_bin_of(ratio, edges)]
        n_kept = int(kept.sum())
        steps_b = torch.full((n_kept,), float(step_b), dtype=torch.float64, device=a.device)
        parts.append((ratio[kept], step_a[kept].double(), steps_b))
    ratio, step_a, step_b = (torch.cat(p)[None] for p in zip(*parts))
    return _best(a[None], b[None], ratio, step_a, step_b)


def _bin_of(ratio: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Bin 0 holds ratios above edges[0] (edges fall), bin k those in (edges[k], edges[k-1]]."""
    return torch.bucketize(-ratio, -edges, right=True)


def _bin_edges(sides: Sequence[Side]) -> torch.Tensor:
    """Falling edges with about equally many events between them, from a sample."""
    n_steps = sum(len(steps) for _, _, steps, _ in sides)
    sample = []
    for magnitude, _, steps, _ in sides:
        stride = max(1, magnitude.shape[1] * n_steps // (4 * N_BINS))
        sample += [magnitude[0, ::stride] / middle for middle, _, _ in steps]
    edges = torch.cat(sample).unique().flip(0)
    return edges[:: max(1, len(edges) // N_BINS)]


def _event_pieces(sides: Sequence[Side]):
    for magnitude, _, steps, _ in sides:
        for piece in magnitude[0].split(PIECE):
            for middle, step, square_step in steps:
                yield piece / middle, piece * step, square_step
