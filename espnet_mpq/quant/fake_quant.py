"""Fake quantization: the float weights, scales and codes of a cluster on its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Union

import torch

from espnet_mpq.quant.grid import Grid, make_grid
from espnet_mpq.quant.projection import Projection, project
from espnet_mpq.quant.scale import Blocks, to_blocks
from espnet_mpq.quant.spec import ClusterSpec


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
    spec: ClusterSpec,
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


def project_clusters(
    mats: Mapping[str, Sequence[torch.Tensor]],
    specs: Mapping[str, ClusterSpec],
    *,
    init: Optional[Mapping[str, Sequence[torch.Tensor]]] = None,
    **options,
) -> Dict[str, ClusterProjection]:
    """Project several clusters; those that share a scale (tying "model") are projected together.

    Args:
        mats: cluster -> float (rows, cols) each.
        specs: cluster -> how it is stored; every cluster of ``mats``.
        init: cluster -> warm start of "als".
        options: method, rounds, scale_dtype as project_cluster.

    Returns:
        Cluster -> projection, in the order of ``mats``.

    Raises:
        InputError: as project_cluster.
    """
    groups: Dict[object, List[str]] = {}
    for name in mats:
        groups.setdefault(specs[name].shared_key or name, []).append(name)
    found: Dict[str, ClusterProjection] = {}
    for names in groups.values():
        start = None
        if init is not None and all(name in init for name in names):
            start = [scale for name in names for scale in init[name]]
        together = [mat for name in names for mat in mats[name]]
        done = project_cluster(together, specs[names[0]], init=start, **options)
        first = 0
        for name in names:
            part = slice(first, first + len(mats[name]))
            first = part.stop
            found[name] = ClusterProjection(
                done.values[part],
                None if done.scales is None else done.scales[part],
                None if done.codes is None else done.codes[part],
            )
    return {name: found[name] for name in mats}


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


def grid_of(spec: ClusterSpec) -> Grid:
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
