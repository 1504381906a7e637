"""Any module as an architecture: shapes and clusters as data, made by walking its layers."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Callable, ClassVar, Dict, Iterable, List, Mapping, Optional, Tuple

import torch

from espnet_mpq.architecture.base import LARGEST_SIZE, Architecture, Difference, Shapes
from espnet_mpq.architecture.gates import gate_clusters
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError
from espnet_mpq.fields import is_count, is_text

Name = Tuple[str, str]  # name and kind of a cluster
COUNTERS = ("num_batches_tracked",)  # of BatchNorm: they count a training, no model needs them
KINDS = {
    torch.nn.Linear: "linear",
    torch.nn.Embedding: "embedding",
    torch.nn.Conv1d: "convolution",
    torch.nn.Conv2d: "convolution",
}


@dataclass(frozen=True)
class ListedArchitecture(Architecture):
    """Shapes and clusters by name; for models whose sizes do not tell them (recognisers).

    Args:
        vocab_size: tokens of the token list, 0 for none.
        title: kind and sizes in a few words, for people.
        state: name -> shape of every parameter and float buffer, in any order.
        groups: (cluster, kind, ((parameter, first row, row behind the last), ...)), each.
        tied: name -> name it is stored under.
        kept_matrices: matrices that stay float.

    Raises:
        InputError: malformed values, parts outside their parameter or in two clusters.
    """

    FAMILY: ClassVar[str] = "listed"

    vocab_size: int
    title: str
    state: Mapping[str, Tuple[int, ...]]
    groups: Tuple[Tuple[str, str, Tuple[Tuple[str, int, int], ...]], ...]
    tied: Mapping[str, str]
    kept_matrices: Tuple[str, ...]

    __hash__ = None

    def __post_init__(self):
        _check(self)
        state = {name: tuple(self.state[name]) for name in sorted(self.state)}
        groups = tuple(
            (name, kind, tuple((p, start, stop) for p, start, stop in parts))
            for name, kind, parts in self.groups
        )
        values = {"state": state, "groups": groups, "kept_matrices": tuple(self.kept_matrices)}
        for key, value in values.items():
            object.__setattr__(self, key, value)
        _check_parts(self)

    def to_dict(self) -> dict:
        return {
            "class": self.FAMILY,
            "vocab_size": self.vocab_size,
            "title": self.title,
            "state": {name: list(shape) for name, shape in self.state.items()},
            "groups": [[n, kind, [list(part) for part in parts]] for n, kind, parts in self.groups],
            "tied": dict(self.tied),
            "kept_matrices": list(self.kept_matrices),
        }

    def state_shapes(self) -> Shapes:
        return dict(self.state)

    def find_clusters(self) -> List[Cluster]:
        return [
            Cluster(name, kind, tuple(self._part(*part) for part in parts))
            for name, kind, parts in self.groups
        ]

    def _part(self, parameter: str, start: int, stop: int) -> Part:
        whole = Part.whole(parameter, self.state[parameter])
        return Part(parameter, start, stop, whole.cols)

    def first_difference(self, other: Architecture) -> Optional[Difference]:
        """Of two large records the one tensor or cluster that tells them apart."""
        if not isinstance(other, ListedArchitecture):
            return super().first_difference(other)
        records = {"state": (self.state, other.state), "groups": (self._groups(), other._groups())}
        for key, (mine, theirs) in records.items():
            for name in {**theirs, **mine}:
                if mine.get(name) != theirs.get(name):
                    return f"{key}, {name}", _short(mine.get(name)), _short(theirs.get(name))
        return super().first_difference(other)

    def _groups(self) -> Dict[str, tuple]:
        return {name: (kind, parts) for name, kind, parts in self.groups}

    def describe(self) -> str:
        vocabulary = f", {self.vocab_size} tokens" if self.vocab_size else ""
        return f"{self.title}{vocabulary}"

    def ties(self) -> Dict[str, str]:
        return dict(self.tied)

    def kept(self) -> Tuple[str, ...]:
        return self.kept_matrices


def list_module(
    module: torch.nn.Module,
    *,
    vocab_size: int = 0,
    title: Optional[str] = None,
    cluster_of: Optional[Callable[[str], Optional[Name]]] = None,
    keep: Iterable[str] = (),
) -> ListedArchitecture:
    """The architecture of a module of Linear, Conv1d, Conv2d, Embedding and LSTM layers.

    Every such layer is a cluster of the layer's name, an LSTM one per gate, ``NAME.l0.i``, of a
    second direction ``NAME.l0.reverse.i``. Depthwise kernels stay float: a row of them is a whole
    filter, and there are few. So do all vectors and float buffers (BatchNorm, GlobalMVN).

    Args:
        cluster_of: module name -> (cluster, kind) that its weight belongs to, None: its own.
        keep: patterns (fnmatch) of parameters that stay float, "*.pos_bias_?" for example.

    Raises:
        InputError: a matrix that is in no such layer and not in ``keep``, a buffer that is no
            float, or an LSTM with a projection.

    Source: own.
    """
    keep = list(keep)
    first: Dict[int, str] = {}  # id of a parameter -> its first name
    state: Dict[str, Tuple[int, ...]] = {}
    tied: Dict[str, str] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not value.is_floating_point():
            if name.rsplit(".", 1)[-1] in COUNTERS:
                continue
            raise InputError(f"{name} is no float tensor", found=value.dtype, expected="float")
        if id(value) in first:
            tied[name] = first[id(value)]
            continue
        first[id(value)] = name
        state[name] = tuple(value.shape)
    groups: Dict[str, Tuple[str, list]] = {}
    kept = []
    for path, layer in module.named_modules():
        for cluster in _clusters_of(path, layer, state, cluster_of):
            for part in cluster.parts:
                if any(fnmatchcase(part.parameter, pattern) for pattern in keep):
                    continue
                if _is_depthwise(layer):
                    kept.append(part.parameter)
                    continue
                rows = groups.setdefault(cluster.name, (cluster.kind, []))[1]
                rows.append((part.parameter, part.start, part.stop))
    covered = {p for _, parts in groups.values() for p, _, _ in parts}
    buffers = {name for name, _ in module.named_buffers()}
    for name, shape in state.items():
        if len(shape) >= 2 and name not in covered and name not in kept:
            if name in buffers or any(fnmatchcase(name, pattern) for pattern in keep):
                kept.append(name)
    return ListedArchitecture(
        vocab_size,
        title or type(module).__name__,
        state,
        tuple((name, kind, tuple(parts)) for name, (kind, parts) in groups.items()),
        tied,
        tuple(kept),
    )


def _clusters_of(path: str, layer, state: Shapes, cluster_of) -> List[Cluster]:
    """The clusters of one layer whose weights are stored under its own name (not tied)."""
    dotted = f"{path}." if path else ""
    if isinstance(layer, torch.nn.LSTM):
        if f"{dotted}weight_ih_l0" not in state:
            return []
        if layer.proj_size:
            raise InputError(
                f"{path} is an LSTM with a projection", found=f"proj_size {layer.proj_size}"
            )
        clusters = []
        for k in range(layer.num_layers):
            for reverse in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
                name = f"{dotted}l{k}" + reverse.replace("_", ".")
                clusters += gate_clusters(name, state, dotted, f"_l{k}{reverse}", "lstm")
        return clusters
    kind = next((kind for base, kind in KINDS.items() if isinstance(layer, base)), None)
    weight = f"{dotted}weight"
    if kind is None or weight not in state:
        return []
    name, kind = (cluster_of(path) if cluster_of else None) or (path or "weight", kind)
    return [Cluster(name, kind, (Part.whole(weight, state[weight]),))]


def _short(value: object) -> object:
    return "nothing" if value is None else str(value)[:120]


def _is_depthwise(layer: torch.nn.Module) -> bool:
    groups = getattr(layer, "groups", 1)
    return groups > 1 and groups == getattr(layer, "in_channels", 0)


def _check(value: ListedArchitecture) -> None:
    """Raise InputError unless every field has the form that its JSON must have."""
    forms = {
        "vocab_size": _is_size,
        "title": is_text,
        "state": lambda v: isinstance(v, Mapping) and all(map(_is_shape, v.values())),
        "groups": lambda v: isinstance(v, (list, tuple)) and all(map(_is_group, v)),
        "tied": lambda v: isinstance(v, Mapping) and all(map(is_text, v.values())),
        "kept_matrices": lambda v: isinstance(v, (list, tuple)) and all(map(is_text, v)),
    }
    for key, is_right in forms.items():
        found = getattr(value, key)
        if not is_right(found):
            raise InputError(f"architecture: bad {key}", found=repr(found)[:80])


def _is_size(value: object) -> bool:
    return is_count(value) and value <= LARGEST_SIZE


def _is_shape(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_size, value))


def _is_group(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    name, kind, parts = value
    return is_text(name) and is_text(kind) and isinstance(parts, (list, tuple)) and all(
        isinstance(part, (list, tuple))
        and len(part) == 3
        and is_text(part[0])
        and is_count(part[1])
        and is_count(part[2])
        for part in parts
    )


def _check_parts(value: ListedArchitecture) -> None:
    names = [name for name, _, _ in value.groups]
    if len(set(names)) != len(names):
        raise InputError("architecture: a cluster is listed twice", found=", ".join(names)[:200])
    rows: Dict[str, List[Tuple[int, int]]] = {}
    for name, _, parts in value.groups:
        if len({parameter for parameter, _, _ in parts}) != len(parts):
            # Tensors of a packed file are named by cluster and parameter.
            raise InputError(f"architecture: cluster {name} names a parameter twice")
        for parameter, start, stop in parts:
            shape = value.state.get(parameter, ())
            if len(shape) < 2 or 0 in shape or not start < stop <= shape[0]:
                raise InputError(
                    f"architecture: cluster {name} names rows that are not there",
                    found=f"{parameter} {start}:{stop}",
                    expected=f"a matrix of the state; this one has shape {list(shape)}",
                )
            rows.setdefault(parameter, []).append((start, stop))
    for parameter, spans in rows.items():
        spans.sort()
        is_whole = spans[0][0] == 0 and spans[-1][1] == value.state[parameter][0]
        if not is_whole or any(a[1] != b[0] for a, b in zip(spans, spans[1:])):
            raise InputError(
                f"architecture: the rows of {parameter} are not in one cluster each",
                found=spans[:8],
                expected=f"0:{value.state[parameter][0]} without gaps or overlaps",
            )
    for name, target in value.tied.items():
        if name in value.state or target not in value.state:
            raise InputError("architecture: bad tied", found=f"{name}: {target}")
    unknown = [name for name in value.kept_matrices if name not in value.state]
    if unknown:
        raise InputError("architecture: bad kept_matrices", found=", ".join(unknown)[:200])
