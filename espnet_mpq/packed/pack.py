"""From float weights and a plan to a packed LM."""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from espnet_mpq.clusters import Cluster
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.packed.architecture import Architecture
from espnet_mpq.packed.bits import pack_codes
from espnet_mpq.packed.dequantize import cluster_values
from espnet_mpq.packed.format import PackedModel, tensor_hashes
from espnet_mpq.packed.metadata import (
    build,
    format_error,
    shorten_command,
    special_ids,
    token_list_record,
)
from espnet_mpq.packed.tensors import codes_name, scales_name, tensor_specs, weight_name
from espnet_mpq.plan import Plan
from espnet_mpq.quant.fake_quant import ClusterProjection, project_cluster, project_model_tied

# values (rows, cols) float32; codes uint8 and scales, None at 16 and 32 bits
_PartProjection = Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
# Weights trained on a grid come back with rounding noise only; more means they were not on it.
ON_GRID_ERROR = 1e-5


def check_weights(
    weights: Mapping[str, torch.Tensor], architecture: Architecture
) -> Dict[str, torch.Tensor]:
    """The parameters of an LM as float32 CPU tensors, checked against the architecture.

    Args:
        weights: parameter name (without ESPnet's prefix "lm.") -> tensor.

    Raises:
        MismatchError: names or shapes differ, or tied matrices hold different values.
        InputError: NaN or infinity.
    """
    shapes = architecture.parameter_shapes()
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
            "the checkpoint does not fit lm_conf",
            found=f"extra {extra[:4]}, missing {missing[:4]}",
            todo="give the checkpoint that was trained with this config.yaml",
        )
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != tuple(shape):
            raise MismatchError(
                f"the checkpoint does not fit lm_conf: {name}",
                found=tuple(weights[name].shape),
                expected=tuple(shape),
                todo="give the checkpoint that was trained with this config.yaml",
            )
        weights[name] = weights[name].detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(weights[name]).all()):
            raise InputError(
                f"the checkpoint has NaN or infinity in {name}",
                todo="give a checkpoint of a training that did not diverge",
            )
    return weights


def pack_lm(
    weights: Mapping[str, torch.Tensor],
    architecture: Architecture,
    plan: Plan,
    token_list: Sequence[str],
    *,
    source: Optional[Mapping] = None,
    fp_weights: Optional[Mapping[str, torch.Tensor]] = None,
) -> PackedModel:
    """Project every cluster on its grid (MSE-optimal scales) and pack the codes.

    Weights that already lie on the plan's grid come back as they are.

    Args:
        weights: parameters of the quantized (or, after training, the fp) LM.
        token_list: the vocabulary, in the order of ids.
        source: JSON-able facts on where the weights come from: strings, integers or None. Its
            ``command`` is cut when the header would get longer than predicted.
        fp_weights: the fp LM; relative errors then compare with it instead of ``weights``.

    Raises:
        MismatchError, InputError: as check_weights; the token list has another size.
        PlanError: the plan does not fit the architecture.
    """
    if len(token_list) != architecture.vocab_size:
        raise MismatchError(
            "token list and LM do not belong together",
            found=f"{len(token_list)} tokens",
            expected=f"{architecture.vocab_size}",
        )
    weights = check_weights(weights, architecture)
    reference = check_weights(fp_weights, architecture) if fp_weights is not None else weights
    specs = tensor_specs(architecture, plan)
    clusters = architecture.clusters()
    tensors: Dict[str, torch.Tensor] = {}
    for cluster, projections in _project(weights, clusters, plan):
        _add_cluster(tensors, cluster, projections, plan)
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
        token_list=token_list_record(token_list),
        ids=special_ids(token_list),
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


def relative_error(mats: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> float:
    """sum (w - v)^2 / sum w^2 over all matrices (0 when all weights are zero and reproduced)."""
    difference = sum(float((w.double() - v.double()).square().sum()) for w, v in zip(mats, values))
    norm = sum(float(w.double().square().sum()) for w in mats)
    return difference / norm if norm > 0 else difference


def _mats(weights: Mapping[str, torch.Tensor], cluster: Cluster) -> List[torch.Tensor]:
    return [weights[p.parameter][p.start : p.stop] for p in cluster.parts]


def _project(
    weights: Mapping[str, torch.Tensor], clusters: Sequence[Cluster], plan: Plan
) -> List[Tuple[Cluster, List[_PartProjection]]]:
    """Projection per cluster; clusters of tying "model" with the same grid share one scale."""
    options = {"method": "mse", "scale_dtype": SCALE_DTYPES[plan.scale_dtype]}
    shared: Dict[tuple, List[Cluster]] = {}
    done = []
    for cluster in clusters:
        spec = plan.clusters[cluster.name]
        if spec.bits < 16 and spec.tying == "model":
            shared.setdefault((spec.bits, spec.grid), []).append(cluster)
        else:
            found = project_cluster(_mats(weights, cluster), spec, **options)
            done.append((cluster, _parts(found)))
    for group in shared.values():
        mats = [mat for cluster in group for mat in _mats(weights, cluster)]
        found = project_model_tied(mats, plan.clusters[group[0].name], **options)
        parts = iter(_parts(found))
        done.extend((cluster, [next(parts) for _ in cluster.parts]) for cluster in group)
    return done


def _parts(found: ClusterProjection) -> List[_PartProjection]:
    nothing = [None] * len(found.values)
    codes, scales = found.codes or nothing, found.scales or nothing
    return list(zip(found.values, codes, scales))


def _add_cluster(
    tensors: Dict[str, torch.Tensor],
    cluster: Cluster,
    projections: Sequence[_PartProjection],
    plan: Plan,
) -> None:
    spec = plan.clusters[cluster.name]
    for part, (values, codes, scales) in zip(cluster.parts, projections):
        if spec.bits >= 16:
            weight = values.to(torch.float16 if spec.bits == 16 else torch.float32)
            if not bool(torch.isfinite(weight).all()):
                raise InputError(
                    f"cluster {cluster.name} has weights beyond the range of float16",
                    todo="give it 32 bits in the plan",
                )
            tensors[weight_name(cluster, part)] = weight
        else:
            tensors[codes_name(cluster, part)] = pack_codes(codes, spec.bits)
            scale_dtype = SCALE_DTYPES[plan.scale_dtype]
            tensors[scales_name(cluster, part, spec)] = scales.to(scale_dtype)
