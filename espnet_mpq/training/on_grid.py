"""The weights on the grid, f(Θ) = αV of the papers: scales and codes of every coded cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional

import torch

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.plan import Plan
from espnet_mpq.quant.fake_quant import project_clusters
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.quant.scale import SCALE_DTYPES, spread

Mats = Dict[str, List[torch.Tensor]]  # cluster name -> one (rows, cols) matrix per part


def coded_names(plan: Plan) -> List[str]:
    """Names of the clusters with codes, in the plan's order."""
    return [name for name, spec in plan.clusters.items() if spec.is_coded]


def copied_to(mats: Mapping, device: torch.device) -> Mats:
    """Copies on a device: what is updated in place must not change the caller's state."""
    return {name: [mat.to(device, copy=True) for mat in parts] for name, parts in mats.items()}


@dataclass
class OnGrid:
    """α and V of all coded clusters.

    Attributes:
        plan: bits, grid and tying of every cluster.
        scales: cluster -> float32 scales per part: row (rows, 1), group (rows, n_groups),
            cluster and model (1, 1), the one tensor repeated for every part that shares it.
        codes: cluster -> uint8 (rows, cols) per part.
    """

    plan: Plan
    scales: Mats
    codes: Mats

    def values(self, name: str, scales: Optional[List[torch.Tensor]] = None) -> List[torch.Tensor]:
        """αV of one cluster, float32 (rows, cols) per part; other ``scales`` may be given."""
        spec = self.plan.clusters[name]
        grid = make_grid(spec.grid, spec.bits)
        scales = self.scales[name] if scales is None else scales
        return [
            spread(scale, code.shape[1], spec.group_size) * grid.values(code)
            for scale, code in zip(scales, self.codes[name])
        ]

    def to_dict(self) -> dict:
        return {"scales": self.scales, "codes": self.codes}

    @classmethod
    def from_dict(cls, plan: Plan, saved: Mapping, device: torch.device) -> "OnGrid":
        """The table that to_dict() of a table of the plan gave, copied to a device."""
        return cls(plan, copied_to(saved["scales"], device), copied_to(saved["codes"], device))


def project(
    mats: Mats,
    plan: Plan,
    method: str = "mse",
    start: Optional[OnGrid] = None,
    rounds: int = 20,
) -> OnGrid:
    """Step 2 of ADMM: the nearest (α, V) to the given weights.

    Args:
        mats: float matrices of every coded cluster of the plan.
        method: "mse" (optimal scale search) or "als" (alternating least squares).
        start: table whose scales warm-start "als".
        rounds: inner rounds of "als".

    Source: Xu et al. 2021 (arXiv 2112.11438), eq. of the table update; here Θ + λ is
    projected, which is what the printed objective asks for.
    """
    names = coded_names(plan)
    done = project_clusters(
        {name: mats[name] for name in names},
        plan.clusters,
        method=method,
        init=None if start is None else start.scales,
        rounds=rounds,
        scale_dtype=SCALE_DTYPES[plan.scale_dtype],
    )
    scales = {name: list(done[name].scales) for name in names}
    return OnGrid(plan, scales, {name: list(done[name].codes) for name in names})


def share(table: OnGrid) -> OnGrid:
    """The table of the first process, in all processes of a distributed run.

    All processes project equal weights, but sums on a GPU may come in any order, and a table
    that differs between processes would pull their weights apart for good.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return table
    if distributed.get_world_size() == 1 or not table.codes:
        return table
    return OnGrid(table.plan, _from_first_process(table.scales), _from_first_process(table.codes))


def _from_first_process(mats: Mats) -> Mats:
    every = [mat for parts in mats.values() for mat in parts]
    flat = torch.cat([mat.reshape(-1) for mat in every])
    torch.distributed.broadcast(flat, src=0)
    pieces = iter(flat.split([mat.numel() for mat in every]))
    return {name: [next(pieces).view(m.shape) for m in parts] for name, parts in mats.items()}


def stored_mats(mats: Mats, table: OnGrid) -> Mats:
    """The weights a packed file would hold: αV, float16 clusters rounded, float32 ones as is."""
    stored = {}
    for name, spec in table.plan.clusters.items():
        if spec.is_coded:
            stored[name] = table.values(name)
        elif spec.bits == 16:
            stored[name] = [mat.half().to(mat.dtype) for mat in mats[name]]
    return stored


def relative_distance(a: Mapping, b: Mapping) -> float:
    """||a - b|| / ||a|| over all matrices of the clusters in ``b``; 0 when a is zero."""
    difference = norm = 0.0
    for name in b:
        for x, y in zip(a[name], b[name]):
            difference += float((x.float() - y.float()).square().sum())
            norm += float(x.float().square().sum())
    return (difference / norm) ** 0.5 if norm > 0 else 0.0


@torch.no_grad()
def project_weights(weights: ClusterWeights, plan: Plan) -> OnGrid:
    """Replace the weights of a module by what a packed file of it would hold; returns αV."""
    mats = {n: weights.mats(n) for n, spec in plan.clusters.items() if spec.bits < 32}
    table = project(mats, plan)
    for name, values in stored_mats(mats, table).items():
        weights.set(name, values)
    return table
