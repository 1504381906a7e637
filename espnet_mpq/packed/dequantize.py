"""From codes and scales back to float32 weights: what a packed LM means."""

from __future__ import annotations

from typing import Dict, List

import torch

from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.packed.bits import unpack_codes
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.tensors import codes_name, scales_name, weight_name
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.quant.scale import spread


def dequantize_part(
    tensors: Dict[str, torch.Tensor], cluster: Cluster, part: Part, spec: ClusterSpec
) -> torch.Tensor:
    """One part of a cluster as a float32 (rows, cols) matrix: float32(scale) * level."""
    if spec.bits >= 16:
        return tensors[weight_name(cluster, part)].float()
    codes = unpack_codes(tensors[codes_name(cluster, part)], spec.bits, part.cols)
    grid = make_grid(spec.grid, spec.bits)
    levels = grid.levels_tensor(codes.device, torch.float32)[codes.long()]
    scales = tensors[scales_name(cluster, part, spec)].float()
    return levels * spread(scales, part.cols, spec.group_size)


def dequantize(packed: PackedModel) -> Dict[str, torch.Tensor]:
    """All parameters as float32, by name; a tied matrix once (``encoder.weight``)."""
    shapes = packed.architecture.parameter_shapes()
    values = {name: torch.empty(shape) for name, shape in shapes.items()}
    for cluster in packed.clusters:
        spec = packed.plan.clusters[cluster.name]
        for part in cluster.parts:
            piece = dequantize_part(packed.tensors, cluster, part, spec)
            values[part.parameter][part.start : part.stop] = piece
    for name, _ in packed.rest:
        values[name].copy_(packed.tensors[name])
    return values


def cluster_values(packed: PackedModel, cluster: Cluster) -> List[torch.Tensor]:
    """The float32 matrices of one cluster, one per part."""
    spec = packed.plan.clusters[cluster.name]
    return [dequantize_part(packed.tensors, cluster, part, spec) for part in cluster.parts]
