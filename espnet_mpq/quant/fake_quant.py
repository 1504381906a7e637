"""Fake quantization: the float weights, scales and codes of a cluster on its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Union

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.quant.grid import Grid, make_grid
from espnet_mpq.quant.projection import Projection, project
from espnet_mpq.quant.scale import Blocks, to_blocks


@dataclass(frozen=True)
class ClusterProjection:
    """One entry per matrix of the cluster.

    Attributes:
        values: float32 (rows, cols) on the grid.
        scales: float32, shapes as scale.scale_shapes; the same tensor (1, 1) for all matrices
            that share one scale. None for 16 and 32 bits.
        codes: uint8 (rows, cols). None for 16 and 32 bits.
    """

    values: List[torch.Tensor]
    scales: Optional[List[torch.Tensor]] = None
    codes: Optional[List[torch.Tensor]] = None


@torch.no_grad()
def project_cluster(
    mats: Sequence[torch.Tensor],
    spec,
    *,
    method: str = "mse",
    init: Optional[Sequence[torch.Tensor]] = None,
    rounds: int = 20,
    scale_dtype: torch.dtype = torch.float16,
) -> ClusterProjection:
    """Project the matrices of one cluster as its spec says.

    Args:
        mats: float (rows, cols) each.
        spec: has bits, grid (a name, or a Grid for learned levels), tying and group_size.
            Tying "model" acts as "cluster" on the matrices given.
        method, rounds, scale_dtype: as projection.project.
        init: warm start of "als", the ``scales`` of an earlier ClusterProjection.

    Raises:
        InputError: as projection.project and scale.to_blocks.
    """
    if spec.bits == 32:
        return ClusterProjection([mat.detach().float() for mat in mats])
    if spec.bits == 16:
        return ClusterProjection([mat.detach().half().float() for mat in mats])
    grid = grid_of(spec)
    options = {"method": method, "rounds": rounds, "scale_dtype": scale_dtype}
    if spec.tying in ("model", "cluster"):
        return _project_blocks(to_blocks(mats, spec.tying), grid, init, options)
    parts = []
    for k, mat in enumerate(mats):  # own scales: no need to pad matrices to one width
        blocks = to_blocks([mat], spec.tying, spec.group_size)
        start = None if init is None else [init[k]]
        parts.append(_project_blocks(blocks, grid, start, options))
    return ClusterProjection(
        [part.values[0] for part in parts],
        [part.scales[0] for part in parts],
        [part.codes[0] for part in parts],
    )


def project_model_tied(mats: Sequence[torch.Tensor], spec, **options) -> ClusterProjection:
    """Project matrices of several clusters with one scale for all (tying "model").

    Args:
        mats: the matrices of all clusters that have the spec's bits and grid, in one flat list.
        spec, options: as project_cluster.
    """
    if spec.tying != "model":
        raise InputError("not one scale for the model", found=f"tying {spec.tying!r}")
    return project_cluster(mats, spec, **options)


def straight_through(w: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` in the forward pass, the identity on ``w`` for gradients (BinaryConnect)."""
    # w + (values - w) would differ from the values by rounding.
    return _StraightThrough.apply(w, values)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, values):
        return values.detach().to(w.dtype).clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def grid_of(spec) -> Grid:
    """The Grid of a spec: the one it holds (learned levels), or the named one at its bits."""
    grid: Union[str, Grid] = spec.grid
    return grid if isinstance(grid, Grid) else make_grid(grid, spec.bits)


def _project_blocks(blocks: Blocks, grid: Grid, init, options: dict) -> ClusterProjection:
    start = None if init is None else blocks.join_scales(init)
    found: Projection = project(
        blocks.values, grid, mask=blocks.mask, init_scale=start, **options
    )
    return ClusterProjection(
        blocks.split(found.values), blocks.split_scales(found.scale), blocks.split(found.codes)
    )
