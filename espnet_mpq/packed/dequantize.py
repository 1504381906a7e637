"""From codes and scales back to float32 weights: what a packed model means."""

from __future__ import annotations

from typing import Callable, Dict, List, Union

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part, as_matrix
from espnet_mpq.packed.bits import unpack_codes
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.tensors import codes_name, scales_name, weight_name
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.quant.scale import spread

Source = Callable[[str], torch.Tensor]  # a tensor of the packed file by its name there


def dequantize_part(
    tensor: Source, cluster: Cluster, part: Part, spec: ClusterSpec
) -> torch.Tensor:
    """One part of a cluster as a float32 (rows, cols) matrix: float32(scale) * level."""
    if not spec.is_coded:
        return tensor(weight_name(cluster, part)).float()
    codes = unpack_codes(tensor(codes_name(cluster, part)), spec.bits, part.cols)
    levels = make_grid(spec.grid, spec.bits).values(codes)
    scales = tensor(scales_name(cluster, part, spec)).float()
    return levels * spread(scales, part.cols, spec.group_size)


def dequantize(
    tensor: Source,
    architecture: Architecture,
    plan: Plan,
    dtype: torch.dtype = torch.float32,
    device: Union[torch.device, str] = "cpu",
) -> Dict[str, torch.Tensor]:
    """Every tensor of the float model by name, in the shapes of the module; tied ones once."""
    shapes = architecture.state_shapes()
    values = {
        name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()
    }
    for cluster in architecture.clusters():
        for part in cluster.parts:
            piece = dequantize_part(tensor, cluster, part, plan.clusters[cluster.name])
            as_matrix(values[part.parameter])[part.start : part.stop] = piece
    for name, _ in architecture.rest():
        values[name].copy_(tensor(name))
    return values


def float_state(packed: PackedModel) -> Dict[str, torch.Tensor]:
    """The float32 state of a packed model, as a checkpoint has it but for tied copies."""
    return dequantize(packed.tensors.__getitem__, packed.architecture, packed.plan)


def cluster_values(packed: PackedModel, cluster: Cluster) -> List[torch.Tensor]:
    """The float32 matrices of one cluster, one per part."""
    spec = packed.plan.clusters[cluster.name]
    tensor = packed.tensors.__getitem__
    return [dequantize_part(tensor, cluster, part, spec) for part in cluster.parts]
