"""The tensors of a packed file: names, dtypes, shapes and order, from architecture and plan."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Dict, List, Tuple

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.packed.bits import row_n_bytes
from espnet_mpq.plan import ClusterSpec, Plan

# dtype in the file -> torch dtype, bytes; written widest first, so that data stay aligned.
DTYPES = {"F32": (torch.float32, 4), "F16": (torch.float16, 2), "U8": (torch.uint8, 1)}
FLOATS = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file; role is codes, scales, weight or rest."""

    name: str
    dtype: str
    shape: Tuple[int, ...]
    role: str

    @property
    def n_bytes(self) -> int:
        return DTYPES[self.dtype][1] * prod(self.shape)


SHARED = "model/"  # names of the scales that clusters share


def codes_name(cluster: Cluster, part: Part) -> str:
    return f"{cluster.name}/{part.parameter}.codes"


def weight_name(cluster: Cluster, part: Part) -> str:
    """The name of a part kept at 16 or 32 bits."""
    return f"{cluster.name}/{part.parameter}.weight"


def scales_name(cluster: Cluster, part: Part, spec: ClusterSpec) -> str:
    """The tensor that holds the scales of a part; shared by tyings "cluster" and "model"."""
    if spec.tying == "model":
        return f"{SHARED}{spec.bits}-{spec.grid}/scale"
    if spec.tying == "cluster":
        return f"{cluster.name}/scale"
    return f"{cluster.name}/{part.parameter}.scales"


def scales_shape(part: Part, spec: ClusterSpec) -> Tuple[int, int]:
    """(1, 1) for tyings model and cluster, (rows, 1) for row, (rows, groups) for group."""
    rows, cols = part.shape
    if spec.tying == "row":
        return rows, 1
    if spec.tying == "group":
        return rows, ceil(cols / spec.group_size)
    return 1, 1


def codes_shape(part: Part, bits: int) -> Tuple[int, int]:
    """Rows, bytes per row: every row is padded to a whole byte."""
    rows, cols = part.shape
    return rows, row_n_bytes(cols, bits)


def cluster_tensors(cluster: Cluster, spec: ClusterSpec, scale_dtype: str) -> List[TensorSpec]:
    """The tensors of one cluster, the scale shared between clusters included."""
    specs = {}
    for part in cluster.parts:
        if not spec.is_coded:
            dtype = "F16" if spec.bits == 16 else "F32"
            tensors = [TensorSpec(weight_name(cluster, part), dtype, part.shape, "weight")]
        else:
            name, shape = scales_name(cluster, part, spec), scales_shape(part, spec)
            tensors = [
                TensorSpec(codes_name(cluster, part), "U8", codes_shape(part, spec.bits), "codes"),
                TensorSpec(name, FLOATS[scale_dtype], shape, "scales"),
            ]
        specs.update((tensor.name, tensor) for tensor in tensors)
    return list(specs.values())


def tensor_specs(architecture: Architecture, plan: Plan) -> List[TensorSpec]:
    """Every tensor of the file in file order: F32, F16, U8, by name within a dtype.

    Raises:
        PlanError: the plan does not name exactly the clusters of this architecture.
    """
    clusters = architecture.clusters()
    plan.check(clusters)
    specs = {}
    for cluster in clusters:
        for spec in cluster_tensors(cluster, plan.clusters[cluster.name], plan.scale_dtype):
            specs[spec.name] = spec
    for name, shape in architecture.rest():
        specs[name] = TensorSpec(name, "F32", tuple(shape), "rest")
    order = list(DTYPES)
    return sorted(specs.values(), key=lambda s: (order.index(s.dtype), s.name))


def parts_by_codes(architecture: Architecture) -> Dict[str, Tuple[Cluster, Part]]:
    """Name of a codes tensor -> its cluster and part, for every part that may have one."""
    return {
        codes_name(cluster, part): (cluster, part)
        for cluster in architecture.clusters()
        for part in cluster.parts
    }
