"""Projection: the nearest (scale, codes) to blocks of weights, one scale per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Optional, Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.quant.grid import Grid
from espnet_mpq.quant.scale import SCALE_DTYPES
from espnet_mpq.quant.sweep import best_scale

PROJECTIONS = ("mse", "als")
MAX_SWEEP_LEVELS = 16
TILE = 1 << 18  # weights worked on at a time: the temporaries stay in the cache

# Data-based start of "als": where the largest level falls, in root mean squares of the row.
START_CLIPS = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
LADDER = 1.03  # ratio of neighbouring scales in the search for grids of many levels
LADDER_N_STEPS = 150
LATTICE_N_COLS = 32
LATTICE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Projection:
    """Scale (G, 1) float32, rounded to the scale dtype; codes (G, K) uint8; values (G, K) float32.

    values = scale * level of the code, each one float32 product. A row of scale 0 has values 0.
    """

    scale: torch.Tensor
    codes: torch.Tensor
    values: torch.Tensor


@torch.no_grad()
def project(
    values: torch.Tensor,
    grid: Grid,
    *,
    mask: Optional[torch.Tensor] = None,
    method: str = "mse",
    init_scale: Optional[torch.Tensor] = None,
    rounds: int = 20,
    scale_dtype: torch.dtype = torch.float16,
) -> Projection:
    """Minimise ||w - scale * level[code]||^2 for every row of ``values``.

    Args:
        values: float (G, K).
        mask: bool (G, K), False where a weight is padding and does not count.
        method: "mse": the global optimum for grids of at most 16 levels (sweep.py); for more
            levels the best of a ladder of scales below max|w| / top level, refined by
            alternating least squares. Either way weights that lie on the grid come back as
            they are. "als": alternating least squares only, a local optimum.
        init_scale: (G, 1) warm start of "als"; rows where it is not positive, or so large
            that all weights round to 0, start from their data.
        rounds: most alternations of "als".
        scale_dtype: float16 or float32; the codes are those of the rounded scale.

    A weight in the middle of two levels takes the upper one, so 0 becomes +scale on grids
    without 0. Rows of zeros get scale 0, as do rows below half of the smallest scale.

    Raises:
        InputError: NaN or infinite weights, a scale beyond float16, wrong shapes or options.

    Source: "als" is step 2 of Xu et al. 2021 (arXiv 2112.11438, Algorithm 1); "mse" is own.
    """
    _check_arguments(values, mask, method, init_scale, scale_dtype)
    n_rows, n_cols = values.shape
    scales = torch.empty(n_rows, 1, dtype=torch.float32, device=values.device)
    codes = torch.empty(n_rows, n_cols, dtype=torch.uint8, device=values.device)
    projected = torch.empty(n_rows, n_cols, dtype=torch.float32, device=values.device)
    is_sweep = method == "mse" and len(grid.levels) <= MAX_SWEEP_LEVELS
    n_rows_chunk = max(1, TILE // n_cols // (max(1, len(grid.levels) // 2) if is_sweep else 1))
    for start in range(0, n_rows, n_rows_chunk):
        rows = slice(start, start + n_rows_chunk)
        w = values[rows].float()
        chunk = _Chunk(w, None if mask is None else mask[rows], grid, scale_dtype)
        if method == "als":
            scale = None if init_scale is None else init_scale[rows].double() * chunk.factor
            scale = chunk.round(_warm_als(chunk, scale, rounds))
        else:
            scale = best_scale(chunk.w, grid, chunk.mask) if is_sweep else _search(chunk)
            scale = _try_lattices(chunk, chunk.round(scale))
        scales[rows] = (scale / chunk.factor).float()
        _fill(w, scales[rows], grid, codes[rows], projected[rows])
    return Projection(scales, codes, projected)


def _check_arguments(values, mask, method, init_scale, scale_dtype) -> None:
    if values.dim() != 2 or values.numel() == 0 or not values.is_floating_point():
        raise InputError(
            "cannot project weights",
            found=f"{values.dtype} of shape {tuple(values.shape)}",
            expected="a floating point (n_scales, width), not empty",
        )
    if mask is not None and (mask.shape != values.shape or mask.dtype != torch.bool):
        raise InputError(
            "cannot project weights: bad mask",
            found=f"{mask.dtype} of shape {tuple(mask.shape)}",
            expected=f"torch.bool {tuple(values.shape)}",
        )
    if method not in PROJECTIONS:
        raise InputError(
            "unknown projection method", found=repr(method), expected=" or ".join(PROJECTIONS)
        )
    if init_scale is not None and tuple(init_scale.shape) != (values.shape[0], 1):
        raise InputError(
            "cannot project weights: bad init_scale",
            found=tuple(init_scale.shape),
            expected=(values.shape[0], 1),
        )
    if scale_dtype not in SCALE_DTYPES.values():
        raise InputError(
            "unknown scale dtype", found=scale_dtype, expected="torch.float16 or torch.float32"
        )


class _Chunk:
    """Some rows, each multiplied by a power of two (exact) so that its largest weight is near 1.

    Squares then neither overflow nor vanish. Scales are float64 (G, 1) of the multiplied rows.
    """

    def __init__(self, w: torch.Tensor, mask: Optional[torch.Tensor], grid: Grid, scale_dtype):
        w = w if mask is None else w * mask
        peak = w.abs().amax(1, keepdim=True)
        if not bool(torch.isfinite(peak).all()):
            raise InputError(
                "NaN or infinity among the weights",
                todo="use a checkpoint of a training that did not diverge",
            )
        exponent = torch.frexp(peak)[1].clamp(-126, 126)
        self.factor = torch.ldexp(torch.ones_like(peak, dtype=torch.float64), -exponent)
        self.w = w * self.factor.float()
        self.peak = peak.double() * self.factor
        self.mask = mask
        self.grid = grid
        self.scale_dtype = scale_dtype

    def take(self, rows: torch.Tensor) -> "_Chunk":
        """The chunk of some of the rows (a tensor of indices)."""
        part = object.__new__(_Chunk)
        part.__dict__.update(self.__dict__, w=self.w[rows], peak=self.peak[rows])
        part.__dict__.update(factor=self.factor[rows])
        part.mask = None if self.mask is None else self.mask[rows]
        return part

    def round(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale as it will be stored."""
        stored = (scale / self.factor).to(self.scale_dtype)
        if not bool(torch.isfinite(stored).all()):
            raise InputError(
                f"a scale is too large for {self.scale_dtype}",
                found=f"weights up to {float((self.peak / self.factor).max()):.4g}",
                todo="use scale_dtype float32, or look why the weights are so large",
            )
        return stored.double() * self.factor

    def pieces(self, scale: torch.Tensor) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """(weights, levels nearest at this scale) by columns; level 0 where masked."""
        divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
        for start in range(0, self.w.shape[1], TILE):
            w = self.w[:, start : start + TILE]
            q = self.grid.levels_of(self.grid.codes_of(w / divisor))
            if self.mask is not None:
                q = q * self.mask[:, start : start + TILE]
            yield w, q

    def sums(self, scale: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(sum w q, sum q q) as float64 (G, 1) for the levels nearest at this scale."""
        a = b = torch.zeros_like(scale)
        for w, q in self.pieces(scale):
            a = a + (w * q).sum(1, keepdim=True).double()
            b = b + q.square_().sum(1, keepdim=True).double()
        return a, b

    def error(self, scale: torch.Tensor) -> torch.Tensor:
        """sum (w - scale q)^2 as float64 (G, 1)."""
        error = torch.zeros_like(scale)
        for w, q in self.pieces(scale):
            difference = q.mul_(-scale.float()).add_(w)
            error = error + difference.square_().sum(1, keepdim=True).double()
        return error


def _warm_als(chunk: _Chunk, scale: Optional[torch.Tensor], rounds: int) -> torch.Tensor:
    if scale is None:
        return _als(chunk, _start(chunk), rounds)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.zeros_like(scale))
    # The trap of a start such as 1.0: all levels 0, and the next scale is 0 / 0.
    a, b = chunk.sums(scale)
    is_lost = ~((a > 0) & (b > 0) & (scale > 0)) & (chunk.peak > 0)
    if rounds > 0:
        scale, rounds = _least_squares(a, b, scale), rounds - 1
    lost = is_lost[:, 0].nonzero()[:, 0]
    if len(lost):
        scale[lost] = _als(chunk.take(lost), _start(chunk.take(lost)), 1)
    return _als(chunk, scale, rounds)


def _als(chunk: _Chunk, scale: torch.Tensor, rounds: int) -> torch.Tensor:
    """At most ``rounds`` times: nearest codes, then the least-squares scale of these codes."""
    for _ in range(rounds):
        before = scale
        scale = _least_squares(*chunk.sums(scale), scale)
        if bool(((scale - before).abs() <= 1e-7 * before).all()):
            break
    return scale


def _least_squares(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where((a > 0) & (b > 0), a / b.clamp(min=1e-300), scale)


def _start(chunk: _Chunk) -> torch.Tensor:
    """The best of a few clipping points; 0 for rows of zeros."""
    counts = chunk.w.shape[1] if chunk.mask is None else chunk.mask.sum(1, keepdim=True)
    square = torch.zeros_like(chunk.peak)
    for piece in chunk.w.split(TILE, dim=1):
        square = square + piece.square().sum(1, keepdim=True).double()
    rms = (square / counts).nan_to_num().sqrt()
    best, least = torch.zeros_like(square), square
    for clip in [factor * rms for factor in START_CLIPS] + [chunk.peak]:
        best, least = _keep_better(chunk, clip / chunk.grid.max_level, best, least)[:2]
    return best


def _search(chunk: _Chunk) -> torch.Tensor:
    """Scale for grids of many levels: a falling ladder from max|w| / top, then least squares."""
    top = max(chunk.grid.levels[-1], -chunk.grid.levels[0] - 1)
    best = chunk.peak / top
    least = chunk.error(best)
    n_idle = 0
    for k in range(1, LADDER_N_STEPS):
        candidate = chunk.peak / (top * LADDER**k)
        best, least, is_better = _keep_better(chunk, candidate, best, least)
        n_idle = 0 if bool(is_better.any()) else n_idle + 1
        if n_idle == 3:
            break
    for _ in range(4):
        candidate = _least_squares(*chunk.sums(best), best)
        best, least, is_better = _keep_better(chunk, candidate, best, least)
        if not bool(is_better.any()):
            break
    return best


def _keep_better(chunk: _Chunk, candidate, best, least):
    error = chunk.error(candidate)
    is_better = error < least
    best, least = torch.where(is_better, candidate, best), torch.where(is_better, error, least)
    return best, least, is_better


def _try_lattices(chunk: _Chunk, scale: torch.Tensor) -> torch.Tensor:
    """Find rows that already lie on the grid, and give them a scale that keeps their values.

    Such a row is max|w| / k times whole numbers. Only the stored scale counts: levels
    {-3, 3} at scale s equal {-1, 1} at 3 s, but 3 s may not exist in float16. A few columns
    rule out nearly all other rows.
    """
    top = chunk.grid.max_level
    if top == 1:
        return scale
    columns = chunk.w[:, :: -(-chunk.w.shape[1] // LATTICE_N_COLS)]
    k = torch.arange(1, top + 1, device=columns.device)
    multiple = (columns / chunk.peak.clamp(min=1e-30).float())[:, :, None] * k
    is_open = ((multiple - multiple.round()).abs() < LATTICE_TOLERANCE).all(1)
    rows = (is_open.any(1) & (chunk.peak[:, 0] > 0)).nonzero()[:, 0]
    if not len(rows):
        return scale
    part, is_open = chunk.take(rows), is_open[rows]
    best, least = scale[rows], part.error(scale[rows])
    enough = 1e-12 * part.peak.square()
    while True:
        todo = (is_open.any(1) & (least > enough)[:, 0]).nonzero()[:, 0]
        if not len(todo):
            break
        few = part.take(todo)
        first = is_open[todo].to(torch.uint8).argmax(1)
        is_open[todo, first] = False
        candidate = few.round(few.peak / (first[:, None] + 1))
        best[todo], least[todo] = _keep_better(few, candidate, best[todo], least[todo])[:2]
    scale = scale.clone()
    scale[rows] = best
    return scale


def _fill(w, scale, grid: Grid, codes: torch.Tensor, values: torch.Tensor) -> None:
    """Write the codes nearest at a float32 scale, and their values."""
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, float("inf")))
    for start in range(0, w.shape[1], TILE):
        columns = slice(start, start + TILE)
        code = grid.codes_of(w[:, columns] / divisor)
        codes[:, columns] = code
        values[:, columns] = grid.levels_of(code).mul_(scale)
