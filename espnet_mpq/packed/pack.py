"""From float weights and a plan to a packed model."""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, as_matrix
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.packed.bits import pack_codes
from espnet_mpq.packed.dequantize import cluster_values
from espnet_mpq.packed.format import PackedModel, tensor_hashes
from espnet_mpq.packed.metadata import (
    build,
    format_error,
    shorten_command,
)
from espnet_mpq.packed.tensors import codes_name, scales_name, tensor_specs, weight_name
from espnet_mpq.plan import Plan
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.fake_quant import ClusterProjection, project_clusters
from espnet_mpq.quant.scale import SCALE_DTYPES
from espnet_mpq.vocabulary import Vocabulary

# Weights trained on a grid come back with rounding noise only; more means they were not on it.
ON_GRID_ERROR = 1e-5


def check_weights(
    weights: Mapping[str, torch.Tensor], architecture: Architecture
) -> Dict[str, torch.Tensor]:
    """The state of a model as float32 CPU tensors, checked against the architecture.

    Args:
        weights: name (without the prefix a host puts before it) -> tensor.

    Raises:
        MismatchError: names or shapes differ, or tied matrices hold different values.
        InputError: NaN or infinity.
    """
    shapes = architecture.state_shapes()
    weights = dict(weights)
    for name, kept in architecture.ties().items():
        repeated = weights.pop(name) if kept in weights and name in weights else None
        if repeated is not None and not torch.equal(repeated, weights[kept]):
            raise MismatchError(
                f"tie_weights is set but the checkpoint's {kept} and {name} differ",
                todo="set tie_weights: false in lm_conf, or give the right checkpoint",
            )
    if set(weights) != set(shapes):
        extra, missing = sorted(set(weights) - set(shapes)), sorted(set(shapes) - set(weights))
        raise MismatchError(
            "the checkpoint does not fit config.yaml",
            found=f"extra {extra[:4]}, missing {missing[:4]}",
            todo="give the checkpoint that was trained with this config.yaml",
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != tuple(shape):
            raise MismatchError(
                f"the checkpoint does not fit config.yaml: {name}",
                found=tuple(weights[name].shape),
                expected=tuple(shape),
                todo="give the checkpoint that was trained with this config.yaml",
            )
        weights[name] = weights[name].detach().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(weights[name]).all()):
            raise InputError(
                f"the checkpoint has NaN or infinity in {name}",
                todo="give a checkpoint of a training that did not diverge",
            )
    return weights


def pack(
    weights: Mapping[str, torch.Tensor],
    architecture: Architecture,
    plan: Plan,
    vocabulary: Vocabulary,
    *,
    source: Optional[Mapping] = None,
    fp_weights: Optional[Mapping[str, torch.Tensor]] = None,
) -> PackedModel:
    """Project every cluster on its grid (MSE-optimal scales) and pack the codes.

    Weights that already lie on the plan's grid come back as they are.

    Args:
        weights: state of the quantized (or, after training, the fp) model.
        vocabulary: of the model.
        source: JSON-able facts on where the weights come from: strings, integers or None. Its
            ``command`` is cut when the header would get longer than predicted.
        fp_weights: the fp model; relative errors then compare with it instead of ``weights``.

    Raises:
        MismatchError, InputError: as check_weights; the token list has another size.
        PlanError: the plan does not fit the architecture.
    """
    if len(vocabulary) != architecture.vocab_size:
        raise MismatchError(
            "token list and LM do not belong together",
            found=f"{len(vocabulary)} tokens",
            expected=f"{architecture.vocab_size}",
        )
    weights = check_weights(weights, architecture)
    reference = check_weights(fp_weights, architecture) if fp_weights is not None else weights
    specs = tensor_specs(architecture, plan)
    clusters = architecture.clusters()
    tensors: Dict[str, torch.Tensor] = {}
    done = project_clusters(
        {cluster.name: _mats(weights, cluster) for cluster in clusters},
        plan.clusters,
        method="mse",
        scale_dtype=SCALE_DTYPES[plan.scale_dtype],
    )
    for cluster in clusters:
        _add_cluster(tensors, cluster, done[cluster.name], plan)
    for name, _ in architecture.rest():
        tensors[name] = weights[name].clone()
    tensors = {spec.name: tensors[spec.name].reshape(spec.shape).contiguous() for spec in specs}
    packed = PackedModel({"architecture": architecture.to_dict(), "plan": plan.to_dict()}, tensors)
    errors = {}
    for cluster in clusters:
        values = cluster_values(packed, cluster)
        errors[cluster.name] = format_error(relative_error(_mats(reference, cluster), values))
    metadata = build(
        architecture,
        plan,
        token_list=vocabulary.record(),
        ids=vocabulary.special_ids,
        source=source or {},
        relative_error=errors,
        error_reference="checkpoint" if reference is weights else "fp",
        tensors=tensor_hashes(tensors),
    )
    return PackedModel(shorten_command(specs, metadata), tensors)


def rounded_clusters(packed: PackedModel, weights: Mapping[str, torch.Tensor]) -> Dict[str, float]:
    """Clusters whose weights were not on the plan's grid, with their squared relative error."""
    weights = check_weights(weights, packed.architecture)
    errors = {
        cluster.name: relative_error(_mats(weights, cluster), cluster_values(packed, cluster))
        for cluster in packed.clusters
    }
    return {name: error for name, error in errors.items() if error > ON_GRID_ERROR}


def _mats(weights: Mapping[str, torch.Tensor], cluster: Cluster) -> List[torch.Tensor]:
    return [as_matrix(weights[p.parameter])[p.start : p.stop] for p in cluster.parts]


def _add_cluster(
    tensors: Dict[str, torch.Tensor], cluster: Cluster, found: ClusterProjection, plan: Plan
) -> None:
    spec = plan.clusters[cluster.name]
    for k, part in enumerate(cluster.parts):
        if spec.is_coded:
            scale_dtype = SCALE_DTYPES[plan.scale_dtype]
            tensors[codes_name(cluster, part)] = pack_codes(found.codes[k], spec.bits)
            tensors[scales_name(cluster, part, spec)] = found.scales[k].to(scale_dtype)
            continue
        weight = found.values[k].to(torch.float16 if spec.bits == 16 else torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(
                f"cluster {cluster.name} has weights beyond the range of float16",
                todo="give it 32 bits in the plan",
            )
        tensors[weight_name(cluster, part)] = weight
