"""Weight clusters: which parts of which parameters share one bit-width, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch

from espnet_mpq.errors import InputError

Mats = List[torch.Tensor]  # one (rows, cols) per part of a cluster


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of one parameter seen as a matrix: its first axis by all the others.

    ``parameter`` is a name relative to the module; a kernel of a convolution (out, in, k) has
    in * k columns.
    """

    parameter: str
    start: int
    stop: int
    cols: int

    @property
    def shape(self) -> Tuple[int, int]:
        return self.stop - self.start, self.cols

    @property
    def n_weights(self) -> int:
        return (self.stop - self.start) * self.cols

    @classmethod
    def whole(cls, parameter: str, shape: Sequence[int]) -> "Part":
        """All of a parameter of at least two axes."""
        return cls(parameter, 0, shape[0], prod(shape[1:]))


@dataclass(frozen=True)
class Cluster:
    """What gets one bit-width; kind: embedding, gate, attention, feed_forward, output, ...

    Raises:
        InputError: no part, or one without weights.
    """

    name: str
    kind: str
    parts: Tuple[Part, ...]

    def __post_init__(self):
        if not self.parts or not all(part.n_weights > 0 for part in self.parts):
            raise InputError(
                f"cluster {self.name} has no weights",
                found=[(part.parameter, part.shape) for part in self.parts] or "no parameter",
                expected="at least one matrix",
            )

    @property
    def n_weights(self) -> int:
        return sum(part.n_weights for part in self.parts)


class ClusterWeights:
    """The weights of a module, cluster by cluster, as (rows, cols) matrices.

    Names are looked up once, so the module must keep its parameter objects; it may move, be cast
    and load other values.

    Args:
        module: has every parameter that the clusters name; tied ones under their first name.
        clusters: each weight in at most one.

    Attributes:
        module: as given.
        clusters: cluster by name, in the order given.

    Raises:
        InputError: the module has no such parameter, or one of another shape.
    """

    def __init__(self, module: torch.nn.Module, clusters: Iterable[Cluster]):
        self.module = module
        self.clusters: Dict[str, Cluster] = {cluster.name: cluster for cluster in clusters}
        parameters = dict(module.named_parameters())
        self._parameters: Dict[str, List[torch.nn.Parameter]] = {}
        for name, cluster in self.clusters.items():
            for part in cluster.parts:
                _check_part(name, part, parameters.get(part.parameter))
            self._parameters[name] = [parameters[part.parameter] for part in cluster.parts]
        self._views: Dict[str, Tuple[tuple, Mats]] = {}

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values()))[0].device

    def mats(self, name: str) -> Mats:
        """The weights of a cluster as detached views, one (rows, cols) per part; not to be kept."""
        parameters = self._parameters[name]
        # A module that moved or was cast has other memory; looking costs less than new views.
        key = tuple([(p.data_ptr(), p.dtype) for p in parameters])
        kept = self._views.get(name)
        if kept is None or kept[0] != key:
            kept = (key, [m.detach() for m in self._cut(name, parameters)])
            self._views[name] = kept
        return kept[1]

    def set(self, name: str, mats: Sequence[torch.Tensor]) -> None:
        """Overwrite the weights of a cluster in place; ``mats`` as mats returns them."""
        with torch.no_grad():
            for view, mat in zip(self.mats(name), mats):
                view.copy_(mat)

    def live(self, name: str) -> Mats:
        """As mats, but differentiable: slices of the parameters."""
        return self._cut(name, self._parameters[name])

    def grads(self, name: str) -> Optional[Mats]:
        """Views into the gradients, shaped as mats; None when a part has none."""
        gradients = [p.grad for p in self._parameters[name]]
        if any(gradient is None for gradient in gradients):
            return None
        return self._cut(name, gradients)

    def parameters(self, name: str) -> List[torch.nn.Parameter]:
        """The parameter of every part; gates of a layer share theirs."""
        return self._parameters[name]

    def _cut(self, name: str, tensors: Sequence[torch.Tensor]) -> Mats:
        parts = self.clusters[name].parts
        return [as_matrix(t)[part.start : part.stop] for t, part in zip(tensors, parts)]


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter as (rows, cols): its first axis by all the others, the same memory.

    Raises:
        InputError: its memory layout (channels_last) allows no such view.
    """
    if tensor.dim() == 2:
        return tensor
    try:
        return tensor.view(tensor.shape[0], -1)
    except RuntimeError as error:
        raise InputError(
            "a weight is not laid out row by row",
            found=f"shape {tuple(tensor.shape)}, strides {tensor.stride()}",
            todo="give the module in torch.contiguous_format",
        ) from error


def _check_part(cluster: str, part: Part, parameter: Optional[torch.Tensor]) -> None:
    shape = None if parameter is None else tuple(parameter.shape)
    if shape is None or len(shape) < 2 or prod(shape[1:]) != part.cols or shape[0] < part.stop:
        raise InputError(
            f"cluster {cluster} does not fit the module: {part.parameter}",
            found="no such parameter" if shape is None else shape,
            expected=f"at least {part.stop} rows of {part.cols} columns",
        )


def loose_matrices(
    shapes: Dict[str, Tuple[int, ...]], clusters: Iterable[Cluster], kept: Iterable[str] = ()
) -> List[str]:
    """Names with two axes or more that are in no cluster and not in ``kept``."""
    covered = {part.parameter for cluster in clusters for part in cluster.parts}
    covered.update(kept)
    return [name for name, shape in shapes.items() if len(shape) >= 2 and name not in covered]
