"""The plan: bits, grid and scale tying of every weight cluster, and what they cost in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterable, Mapping, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import PlanError, near_matches
from espnet_mpq.io import read_json, write_json
from espnet_mpq.quant.spec import (
    BITS,
    GRIDS,
    MOST_COLS,
    QUANTIZED_BITS,
    SCALE_N_BYTES,
    TYINGS,
    ClusterSpec,
)

if TYPE_CHECKING:  # clusters needs torch, which reading a plan does not
    from espnet_mpq.clusters import Cluster

__all__ = [
    "BITS",
    "GRIDS",
    "MOST_COLS",
    "QUANTIZED_BITS",
    "SCALE_N_BYTES",
    "TYINGS",
    "ClusterSpec",
    "Plan",
]

FORMAT = "espnet_mpq.plan"
VERSION = 1
SOURCE_ROLES = ("checkpoint", "token_list", "text", "data", "sensitivity")


@dataclass(frozen=True)
class Plan:
    """Cluster name -> ClusterSpec, plus the dtype of the scales; immutable."""

    clusters: Mapping[str, ClusterSpec]
    scale_dtype: str = "float16"
    provenance: Mapping = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if not isinstance(self.scale_dtype, str) or self.scale_dtype not in SCALE_N_BYTES:
            raise PlanError(
                "plan: unknown scale_dtype",
                found=repr(self.scale_dtype),
                expected="one of " + ", ".join(SCALE_N_BYTES),
            )
        if not self.clusters:
            raise PlanError("plan: no clusters", expected="at least one cluster with its bits")
        for name, spec in self.clusters.items():
            spec.check(name)

    @classmethod
    def from_dict(cls, value: Mapping) -> "Plan":
        """Read the JSON form (a plan file, or ``plan`` inside lm_conf).

        Raises:
            PlanError: another format or version, unknown keys, unsupported values.
        """
        is_object = isinstance(value, Mapping)
        clusters = value.get("clusters") if is_object else None
        if not isinstance(clusters, Mapping):
            raise PlanError(
                "plan: not a plan",
                found=(f"clusters: {clusters!r}" if is_object else repr(value))[:80],
                expected='{"format": "%s", "version": %d, "clusters": {...}}' % (FORMAT, VERSION),
                todo="write one with `mpq plan`",
            )
        _refuse_unknown(
            value, ("format", "version", "clusters", "scale_dtype", "provenance"), "plan"
        )
        if value.get("format", FORMAT) != FORMAT:
            raise PlanError(
                "plan: wrong format", found=repr(value["format"]), expected=repr(FORMAT)
            )
        version = value.get("version", VERSION)
        if type(version) is not int or version != VERSION:
            raise PlanError(
                "plan: unknown version",
                found=repr(version),
                expected=VERSION,
                todo="upgrade espnet_mpq or write the plan again with `mpq plan`",
            )
        clusters = {}
        for name, spec in value["clusters"].items():
            if not isinstance(spec, Mapping) or "bits" not in spec:
                raise PlanError(
                    f"plan, cluster {name}: no bits",
                    found=repr(spec)[:80],
                    expected='an object such as {"bits": 4}',
                )
            _refuse_unknown(spec, ClusterSpec.__dataclass_fields__, f"plan, cluster {name}")
            clusters[str(name)] = ClusterSpec(**spec)
        record = value.get("provenance") or {}
        if not isinstance(record, Mapping):
            raise PlanError("plan: bad provenance", found=repr(record)[:80], expected="an object")
        return cls(clusters, value.get("scale_dtype", "float16"), record)

    def to_dict(self, provenance: bool = True) -> dict:
        """The JSON form; ``provenance=False`` for what alone decides how an LM is stored."""
        value = {
            "format": FORMAT,
            "version": VERSION,
            "scale_dtype": self.scale_dtype,
            "clusters": {name: spec.to_dict() for name, spec in self.clusters.items()},
        }
        if provenance and self.provenance:
            value["provenance"] = dict(self.provenance)
        return value

    def inline(self) -> dict:
        """The JSON form for lm_conf: of the provenance only `source`, so it stays short."""
        value, source = self.to_dict(provenance=False), self.source()
        return {**value, "provenance": source} if source else value

    def source(self) -> Dict[str, Union[str, int]]:
        """SHA-256 of the files the plan was made from, and the seed: those that are recorded.

        Keys: checkpoint_sha256 (of the fp model), token_list_sha256, text_sha256, data_sha256,
        sensitivity_sha256, seed; read from the nested record of `mpq plan` or a flat one.
        """
        inputs, options = (self.provenance.get(k) or {} for k in ("inputs", "options"))
        facts: Dict[str, Union[str, int]] = {}
        for role in SOURCE_ROLES:
            key = f"{role}_sha256"
            nested = inputs.get(role) if isinstance(inputs, Mapping) else None
            nested = nested.get("sha256") if isinstance(nested, Mapping) else None
            value = self.provenance.get(key, nested)
            if isinstance(value, str):
                facts[key] = value
        nested = options.get("seed") if isinstance(options, Mapping) else None
        seed = self.provenance.get("seed", nested)
        if type(seed) is int:
            facts["seed"] = seed
        return facts

    @classmethod
    def read(cls, path: Union[str, Path]) -> "Plan":
        """Read plan.json; raises PlanError, which names the file, or InputError."""
        try:
            return cls.from_dict(read_json(path))
        except PlanError as error:
            raise error.at(path) from error

    def write(self, path: Union[str, Path]) -> None:
        """Write plan.json atomically."""
        write_json(path, self.to_dict())

    def check(self, clusters: Iterable[Cluster]) -> None:
        """Raise PlanError unless the plan names exactly these clusters."""
        known = dict.fromkeys(cluster.name for cluster in clusters)
        for name in self.clusters:
            if name not in known:
                raise PlanError(
                    "plan: unknown cluster", found=repr(name), todo=near_matches(name, known)
                )
        missing = [name for name in known if name not in self.clusters]
        if missing:
            raise PlanError("plan: clusters without bits", found=", ".join(missing))


def _refuse_unknown(value: Mapping, known: Iterable[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise PlanError(f"{where}: unknown key", found=repr(key), todo=near_matches(key, known))


def uniform_plan(
    clusters: Iterable[Cluster],
    bits: int,
    grid: str = "uniform",
    tying: str = "row",
    group_size: Optional[int] = None,
    scale_dtype: str = "float16",
) -> Plan:
    """The same spec for every cluster."""
    spec = ClusterSpec(bits, grid, tying, group_size)
    return Plan({cluster.name: spec for cluster in clusters}, scale_dtype)


@dataclass(frozen=True)
class PlanSize:
    """What a plan costs: bytes of the whole packed file and bits per weight of the LM."""

    n_bytes: int
    n_weights: int

    @property
    def effective_bits(self) -> float:
        return 8.0 * self.n_bytes / self.n_weights


def cluster_n_bytes(cluster: Cluster, spec: ClusterSpec, scale_dtype: str = "float16") -> int:
    """Bytes of a cluster's tensors: codes (each row padded to a whole byte) and scales.

    The scale that tying "model" shares between clusters is not counted here
    (plan_size counts it once); group scales count per row and group, the last
    group of a row may be short.
    """
    if not spec.is_coded:
        return cluster.n_weights * spec.bits // 8
    n_bytes = 0
    n_scales = 1 if spec.tying == "cluster" else 0
    for part in cluster.parts:
        rows, cols = part.shape
        n_bytes += rows * ceil(cols * spec.bits / 8)
        if spec.tying == "row":
            n_scales += rows
        elif spec.tying == "group":
            n_scales += rows * ceil(cols / spec.group_size)
    return n_bytes + n_scales * SCALE_N_BYTES[scale_dtype]


def plan_size(
    plan: Plan,
    clusters: Sequence[Cluster],
    rest: Sequence[Tuple[str, tuple]],
    header_n_bytes: int = 0,
) -> PlanSize:
    """Size of the packed file that a plan leads to.

    Args:
        rest: (name, shape) of the parameters that stay float32 (Architecture.rest).
        header_n_bytes: bytes of the file header (packed.header_n_bytes).
    """
    n_bytes = header_n_bytes + 4 * sum(prod(shape) for _, shape in rest)
    shared = set()
    for cluster in clusters:
        spec = plan.clusters[cluster.name]
        n_bytes += cluster_n_bytes(cluster, spec, plan.scale_dtype)
        shared.add(spec.shared_key)
    n_bytes += len(shared - {None}) * SCALE_N_BYTES[plan.scale_dtype]
    return PlanSize(n_bytes, total_n_weights(clusters, rest))


def total_n_weights(clusters: Sequence[Cluster], rest: Sequence[Tuple[str, tuple]]) -> int:
    """All parameters of the fp LM, tied ones once: the denominator of effective bits."""
    return sum(c.n_weights for c in clusters) + sum(prod(shape) for _, shape in rest)


def budget_n_bytes(
    n_weights: int, effective_bits: Optional[float] = None, n_bytes: Optional[int] = None
) -> Optional[int]:
    """Most bytes of a packed file under a budget in effective bits or in bytes; None: no budget.

    Args:
        n_weights: of the fp LM, as total_n_weights counts them.
    """
    if n_bytes is not None or effective_bits is None:
        return n_bytes
    # Floor: the file may not exceed the budget by one bit. A boundless budget is a number, too.
    return int(min(effective_bits * n_weights / 8, 2**62))

