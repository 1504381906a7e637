"""How large a packed file will be: exactly, and as a sum over clusters that bounds it below."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Dict, List, Mapping, Sequence, Tuple

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster
from espnet_mpq.packed.container import PREFIX_N_BYTES, canonical_json, header_json
from espnet_mpq.packed.metadata import (
    RESERVED,
    RESERVED_N_BYTES,
    build,
    format_error,
    header_bytes,
)
from espnet_mpq.packed.tensors import SHARED, TensorSpec, cluster_tensors, tensor_specs
from espnet_mpq.plan import Plan, PlanSize, cluster_n_bytes, plan_size
from espnet_mpq.quant.spec import ClusterSpec

NO_HASH = "0" * 64


def header_n_bytes(architecture: Architecture, plan: Plan) -> int:
    """Bytes of the header, its 8-byte length included, that a packed file will have.

    Exact as long as what is known only when packing (source, special ids) fits into
    RESERVED_N_BYTES; packing shortens a long command line to that end.
    """
    specs = tensor_specs(architecture, plan)
    metadata = _blank(architecture, plan, specs)
    return PREFIX_N_BYTES + len(header_bytes(specs, metadata))


@dataclass(frozen=True)
class PackedSize(PlanSize):
    """Of a whole packed file.

    Attributes:
        n_bytes, n_weights: of all of it.
        header_n_bytes: of the header, its 8-byte length included.
        clusters: name -> bytes of the cluster's own tensors.
    """

    header_n_bytes: int
    clusters: Mapping[str, int]

    @property
    def fixed_n_bytes(self) -> int:
        """What the file holds besides its clusters: header, float rest, shared scales."""
        return self.n_bytes - sum(self.clusters.values())


def packed_size(architecture: Architecture, plan: Plan) -> PackedSize:
    """What the packed file of a plan will have, to the byte."""
    header, clusters = header_n_bytes(architecture, plan), architecture.clusters()
    whole = plan_size(plan, clusters, architecture.rest(), header)
    own = {c.name: cluster_n_bytes(c, plan.clusters[c.name], plan.scale_dtype) for c in clusters}
    return PackedSize(whole.n_bytes, whole.n_weights, header, own)


def most_fixed_n_bytes(
    architecture: Architecture, specs: Sequence[ClusterSpec], scale_dtype: str
) -> int:
    """PackedSize.fixed_n_bytes of the worst uniform plan of ``specs``.

    The header grows by a few bytes with the places of the tensors in the file; so no true file
    is larger than reckoned with this.
    """
    names = [cluster.name for cluster in architecture.clusters()]
    plans = [Plan(dict.fromkeys(names, spec), scale_dtype) for spec in specs]
    return max(packed_size(architecture, plan).fixed_n_bytes for plan in plans)


def least_header_n_bytes(
    architecture: Architecture, spec_of: Mapping[int, ClusterSpec], scale_dtype: str
) -> Tuple[int, Dict[str, Dict[int, int]]]:
    """(fixed bytes, cluster -> bits -> bytes) whose sum no plan's header falls below.

    The header is a sum over clusters but for what is bounded from below here: the digits of
    the tensors' places in the file, scales that clusters share, padding to a multiple of 8.

    Args:
        spec_of: bits -> spec, the choices for every cluster.
    """
    clusters = architecture.clusters()
    rest_n_bytes = 4 * sum(prod(shape) for _, shape in architecture.rest())
    first = next(iter(spec_of.values()))
    base = Plan({cluster.name: first for cluster in clusters}, scale_dtype)
    base_n_bytes = _text_n_bytes(architecture, base)
    own: Dict[str, Dict[int, int]] = {}
    for cluster in clusters:
        of_base = _entries_n_bytes(cluster, first, scale_dtype)
        own[cluster.name] = {}
        for bits, spec in spec_of.items():
            digits = 0
            for tensor in _own_tensors(cluster, spec, scale_dtype):
                # All of the float32 rest comes before other dtypes.
                start = 0 if tensor.dtype == "F32" else rest_n_bytes
                digits += len(f"{start}{start + tensor.n_bytes}")
            entries = _entries_n_bytes(cluster, spec, scale_dtype)
            own[cluster.name][bits] = entries - of_base + digits
    start, digits = 0, 0
    for _, shape in sorted(architecture.rest()):
        digits += len(f"{start}{start + 4 * prod(shape)}")
        start += 4 * prod(shape)
    return PREFIX_N_BYTES + RESERVED_N_BYTES + base_n_bytes + digits, own


def _own_tensors(cluster: Cluster, spec: ClusterSpec, scale_dtype: str) -> List[TensorSpec]:
    tensors = cluster_tensors(cluster, spec, scale_dtype)
    return [tensor for tensor in tensors if not tensor.name.startswith(SHARED)]


def _entries_n_bytes(cluster: Cluster, spec: ClusterSpec, scale_dtype: str) -> int:
    """Bytes in the header that a cluster's spec decides, without the digits of offsets.

    Its entry in the plan, and every tensor of its own as an entry of the container and a hash.
    """
    n_bytes = _inner_n_bytes(spec.to_dict())
    for tensor in _own_tensors(cluster, spec, scale_dtype):
        n_bytes += _inner_n_bytes({tensor.name: NO_HASH}) - len("{}") + len(",")
        entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, 0]}
        text = json.dumps({tensor.name: entry}, separators=(",", ":"), ensure_ascii=False)
        n_bytes += len(text.encode("utf-8")) - len("{}") + len(",") - len("00")
    return n_bytes


def _inner_n_bytes(value: object) -> int:
    """Bytes of canonical JSON inside a JSON string, where quotes are escaped."""
    text = json.dumps(canonical_json(value), ensure_ascii=False)
    return len(text.encode("utf-8")) - len('""')


def _text_n_bytes(architecture: Architecture, plan: Plan) -> int:
    """Length of the bare header without the digits of offsets and without shared scales."""
    specs = [s for s in tensor_specs(architecture, plan) if not s.name.startswith(SHARED)]
    metadata = {**_blank(architecture, plan, specs), **RESERVED}
    offset, digits = 0, 0
    for spec in specs:
        digits += len(f"{offset}{offset + spec.n_bytes}")
        offset += spec.n_bytes
    return len(header_json(specs, metadata)) - digits


def _blank(architecture: Architecture, plan: Plan, specs: Sequence[TensorSpec]) -> dict:
    """Metadata as long as the real ones, but for what `RESERVED` makes room for."""
    return build(
        architecture,
        plan,
        token_list={"n_tokens": architecture.vocab_size, "sha256": NO_HASH},
        ids={},
        source={},
        relative_error={name: format_error(0.0) for name in plan.clusters},
        error_reference="",
        tensors={spec.name: NO_HASH for spec in specs},
    )
