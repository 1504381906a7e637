"""Second-order rounding: codes and scales that change least what a matrix does to its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, List, Optional, Sequence, Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.quant.covariance import TILE, Covariance
from espnet_mpq.quant.fake_quant import ClusterProjection, grid_of, project_cluster
from espnet_mpq.quant.grid import Grid
from espnet_mpq.quant.scale import scale_shapes

ROUNDS = 2  # of codes and scales in turn
SWEEPS = 2  # over all columns, after the codes of a round
BLOCK = 128  # columns whose updates of the later ones are made at once


@dataclass(frozen=True)
class Joined:
    """Matrices of a cluster that lie side by side before one input, as W and U of an LSTM gate.

    Attributes:
        parts: their places in the cluster's list, in the order of the covariance's columns.
        covariance: of the joined input.
        row_weights: float (rows,), how much an error of a row counts; matters only where rows
            share a scale. None: all the same.
    """

    parts: Tuple[int, ...]
    covariance: Covariance
    row_weights: Optional[torch.Tensor] = None


@torch.no_grad()
def round_cluster(
    mats: Sequence[torch.Tensor],
    spec,
    joined: Sequence[Joined],
    *,
    rounds: int = ROUNDS,
    sweeps: int = SWEEPS,
    scale_dtype: torch.dtype = torch.float16,
    start: Optional[ClusterProjection] = None,
    fit_scales: bool = True,
) -> ClusterProjection:
    """Minimise sum of (w - q) C (w - q)' over the rows of all matrices, C the inputs' covariance.

    Codes column by column, every error made up for by the columns that are still float
    (GPTQ); then coordinate descent over all columns, then the scales by least squares under
    C, and again. Rows (with a shared scale: clusters) that end no better than plain rounding
    are rounded plainly, so the error is never larger than that of project_cluster.

    Args:
        mats, spec, scale_dtype: as project_cluster, which does 16 and 32 bits.
        joined: every matrix in exactly one of them.
        rounds: of codes and scales.
        sweeps: of coordinate descent in each round.
        start: scales and codes to begin with, which the result is never worse than; None: those
            of project_cluster.
        fit_scales: False: keep the scales of ``start``, which matrices elsewhere may share.

    Raises:
        InputError: as project_cluster; a covariance of another width than the matrices.

    Source: Frantar et al. 2022 (GPTQ, arXiv 2210.17323, Algorithm 1, order of columns by
    falling diagonal); coordinate descent as Behdin et al. 2023 (QuantEase, arXiv 2309.01885);
    scales and joined inputs are own.
    """
    if spec.bits >= 16:
        return project_cluster(mats, spec)
    _check_joined(mats, joined)
    if start is None:
        start = project_cluster(mats, spec, scale_dtype=scale_dtype)
    is_shared = spec.tying in ("model", "cluster")
    problems = [_Problem(mats, spec, j, is_shared, scale_dtype) for j in joined]
    for problem in problems:
        problem.start(start.scales, start.codes)
    for _ in range(rounds):
        for problem in problems:
            problem.make_codes(sweeps)
        if fit_scales:
            _refit(problems, is_shared)
        _keep_better(problems, is_shared)
    return _gather(mats, problems, spec)


def mean_shift(
    mats: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    fp_means: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
) -> torch.Tensor:
    """(rows,) float32: what a bias must gain so that the mean output stays, sum w f - q x.

    Args:
        mats, values: (rows, cols) each, float and rounded; side by side.
        fp_means, means: (cols,) each, of their inputs in the float model (f) and now (x).
    """
    parts = zip(mats, values, fp_means, means)
    shifts = [w.double() @ f.double() - q.double() @ x.double() for w, q, f, x in parts]
    return torch.stack(shifts).sum(0).float()


class _Problem:
    """One joined matrix W (R, C) with its scales (R, S), codes and the best of both so far.

    ``segment`` (C,) names the scale of a row that a column uses.
    """

    def __init__(self, mats, spec, joined: Joined, is_shared: bool, scale_dtype: torch.dtype):
        self.joined, self.covariance = joined, joined.covariance
        parts = [mats[k] for k in joined.parts]
        device = parts[0].device
        self.w = torch.cat([m.detach() for m in parts], 1)
        if self.w.dtype != torch.float64:
            self.w = self.w.float()
        self.grid: Grid = grid_of(spec)
        self.scale_dtype = scale_dtype
        self.shapes = [tuple(m.shape) for m in parts]
        widths = [s[1] for s in scale_shapes(self.shapes, spec.tying, spec.group_size)]
        segments, first = [], 0
        for (_, cols), n_groups in zip(self.shapes, widths):
            column = torch.arange(cols, device=device)
            group = column // spec.group_size if spec.group_size is not None else 0 * column
            segments.append(first + group)
            first += 0 if is_shared else n_groups
        self.n_scales = max(first, 1)
        self.segment = torch.cat(segments)
        weights = joined.row_weights
        self.row_weights = None if weights is None else weights.double().to(device)
        self.levels = self.grid.levels_tensor(device, self.w.dtype)

    def start(self, scales, codes) -> None:
        rows = self.w.shape[0]
        own = [scales[k].to(self.w.dtype) for k in self.joined.parts]
        if self.n_scales == 1:
            self.scale = own[0].expand(rows, 1).clone()
        else:
            self.scale = torch.cat(own, 1)
        self.codes = torch.cat([codes[k] for k in self.joined.parts], 1)
        self.best_error = self.error()
        self.best = self.scale.clone(), self.codes

    def values(self, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return self.levels[codes.long()].mul_(scale[:, self.segment])

    def error(self) -> torch.Tensor:
        """Of every row with the scales and codes as they are, (R,) float64."""
        return torch.cat(
            [
                self.covariance.error(
                    self.w[rows] - self.values(self.scale[rows], self.codes[rows])
                )
                for rows in self.row_tiles()
            ]
        )

    def row_tiles(self) -> Iterator[slice]:
        n = max(1, TILE // self.w.shape[1])
        return (slice(k, k + n) for k in range(0, self.w.shape[0], n))

    def make_codes(self, sweeps: int) -> None:
        """New codes at the scales as they are."""
        order, dtype = self.covariance.order, self.w.dtype
        updates = self.covariance.updates.to(dtype)
        damped = self.covariance.damped[order][:, order].to(dtype) if sweeps else None
        codes = torch.empty(self.w.shape, dtype=torch.uint8, device=self.w.device)
        for rows in self.row_tiles():
            w = self.w[rows][:, order].T.contiguous()  # columns as rows: contiguous
            scale = self.scale[rows][:, self.segment[order]].T.contiguous()
            q = _one_by_one(w, scale, updates, self.grid)
            for _ in range(sweeps):
                if not _sweep(w, scale, q, damped, self.grid):
                    break
            codes[rows] = _codes(q, scale, self.grid).T[:, order.argsort()]
        self.codes = codes

    def scale_sums(self, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """For scale k of every row: (r C l', l C l') float64 (R,), l its levels, r = w - q."""
        matrix = self.covariance.damped.to(self.w.dtype)
        columns = (self.segment == k).nonzero()[:, 0]
        tops, bottoms = [], []
        for rows in self.row_tiles():
            level = self.levels[self.codes[rows][:, columns].long()]
            difference = self.w[rows] - self.values(self.scale[rows], self.codes[rows])
            top = (difference @ matrix[:, columns]).mul_(level)
            bottom = (level @ matrix[columns][:, columns]).mul_(level)
            tops.append(top.sum(1, dtype=torch.float64))
            bottoms.append(bottom.sum(1, dtype=torch.float64))
        return torch.cat(tops), torch.cat(bottoms)

    def move_scale(self, k: int, change: torch.Tensor) -> None:
        """Add to scale k of every row where the sum is a scale: positive, stored as finite."""
        old = self.scale[:, k]
        new = (old.double() + change).to(self.scale_dtype).to(self.w.dtype)
        is_scale = torch.isfinite(new) & (new > 0) & (old > 0)
        self.scale[:, k] = torch.where(is_scale, new, old)


def _refit(problems: List[_Problem], is_shared: bool) -> None:
    """Scales by least squares under the damped covariance, one after the other."""
    if not is_shared:
        for problem in problems:
            for k in range(problem.n_scales):
                top, bottom = problem.scale_sums(k)
                problem.move_scale(k, top / bottom.clamp(min=1e-300))
        return
    top = bottom = 0.0
    for problem in problems:
        t, b = problem.scale_sums(0)
        weights = 1.0 if problem.row_weights is None else problem.row_weights
        top, bottom = top + float((weights * t).sum()), bottom + float((weights * b).sum())
    for problem in problems:
        change = torch.full_like(problem.best_error, top / max(bottom, 1e-300))
        problem.move_scale(0, change)


def _keep_better(problems: List[_Problem], is_shared: bool) -> None:
    """Keep the scales and codes where they are better than the best: by rows, or altogether."""
    errors = [problem.error() for problem in problems]
    masks = [error < problem.best_error for error, problem in zip(errors, problems)]
    if is_shared:
        new = before = 0.0
        for error, problem in zip(errors, problems):
            weights = 1.0 if problem.row_weights is None else problem.row_weights
            new = new + float((weights * error).sum())
            before = before + float((weights * problem.best_error).sum())
        masks = [torch.full_like(mask, new < before) for mask in masks]
    for error, problem, is_better in zip(errors, problems, masks):
        rows, (scale, codes) = is_better[:, None], problem.best
        scale, codes = (
            torch.where(rows, problem.scale, scale),
            torch.where(rows, problem.codes, codes),
        )
        problem.best = scale, codes
        problem.best_error = torch.where(is_better, error, problem.best_error)


def _gather(mats, problems: List[_Problem], spec) -> ClusterProjection:
    """The best of all problems as matrices of the cluster."""
    n = len(mats)
    values, scales, codes = [None] * n, [None] * n, [None] * n
    shared = None
    for problem in problems:
        scale, code = problem.best
        value = problem.values(scale, code).float()
        if spec.tying in ("model", "cluster"):
            shared = scale[:1].float() if shared is None else shared
        first = 0
        for k, (_, cols) in zip(problem.joined.parts, problem.shapes):
            columns = slice(first, first + cols)
            values[k] = value[:, columns].contiguous()
            codes[k] = code[:, columns].contiguous()
            used = problem.segment[columns]
            own = slice(int(used[0]), int(used[-1]) + 1)
            scales[k] = shared if shared is not None else scale[:, own].float().contiguous()
            first += cols
    return ClusterProjection(values, scales, codes)


def _codes(q: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """uint8 codes of values on the grid, or nearest to them."""
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, float("inf")))
    return grid.codes_of(q / divisor).to(torch.uint8)


def _nearest(w: torch.Tensor, scale: torch.Tensor, divisor: torch.Tensor, grid: Grid):
    return grid.levels_of(grid.codes_of(w / divisor)).mul_(scale)


def _one_by_one(w: torch.Tensor, scale, updates: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Values on the grid, chosen column by column; the columns are the rows of all (C, R).

    Within a block every error moves the rest of the block at once; the columns behind the
    block are moved when it is done: the same sums, as products of matrices.
    """
    w, q = w.clone(), torch.empty_like(w)
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, float("inf")))
    n_cols = w.shape[0]
    for start in range(0, n_cols, BLOCK):
        stop = min(start + BLOCK, n_cols)
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            q[i] = _nearest(w[i], scale[i], divisor[i], grid)
            error = (w[i] - q[i]) / updates[i, i]
            errors[i - start] = error
            w[i + 1 : stop].addr_(updates[i, i + 1 : stop], error, alpha=-1.0)
        w[stop:].addmm_(updates[start:stop, stop:].T, errors, alpha=-1.0)
    return q


def _sweep(w: torch.Tensor, scale, q: torch.Tensor, matrix: torch.Tensor, grid: Grid) -> bool:
    """Coordinate descent: every column once to its best value with the others as they are.

    Changes ``q`` (C, R) in place; False when nothing changed.
    """
    divisor = torch.where(scale > 0, scale, torch.full_like(scale, float("inf")))
    gradient = matrix @ (w - q)
    n_cols, is_changed = w.shape[0], False
    for start in range(0, n_cols, BLOCK):
        stop = min(start + BLOCK, n_cols)
        changes = torch.zeros_like(w[start:stop])
        for i in range(start, stop):
            best = _nearest(q[i] + gradient[i] / matrix[i, i], scale[i], divisor[i], grid)
            changes[i - start] = change = q[i] - best
            q[i] = best
            gradient[i + 1 : stop].addr_(matrix[i, i + 1 : stop], change)
        if bool(changes.any()):
            is_changed = True
            gradient[stop:].addmm_(matrix[stop:, start:stop], changes)
    return is_changed


def _check_joined(mats, joined: Sequence[Joined]) -> None:
    places = sorted(k for j in joined for k in j.parts)
    if places != list(range(len(mats))):
        raise InputError(
            "every matrix has one input",
            found=f"inputs of {places}",
            expected=f"0..{len(mats) - 1}",
        )
    for j in joined:
        rows, cols = {mats[k].shape[0] for k in j.parts}, sum(mats[k].shape[1] for k in j.parts)
        if len(rows) != 1 or cols != j.covariance.n_cols:
            raise InputError(
                "a covariance does not fit its matrices",
                found=f"{j.covariance.n_cols} inputs, matrices of {cols} columns, {rows} rows",
            )
