"""The shape of a model: which tensors its state has, which of them share bits, which stay float."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, fields
from functools import cached_property
from typing import ClassVar, Dict, List, Mapping, Optional, Tuple

from espnet_mpq.clusters import Cluster, loose_matrices
from espnet_mpq.errors import InputError, near_matches

Shapes = Dict[str, Tuple[int, ...]]
Difference = Tuple[str, object, object]  # what, its value here, its value there
LARGEST_SIZE = 2**31 - 1


class Architecture(ABC):
    """One kind of model with its sizes; subclasses are frozen dataclasses, FAMILY names the kind.

    ``vocab_size`` is the number of tokens of its token list, 0 for a model without one.
    """

    FAMILY: ClassVar[str]
    vocab_size: int

    @classmethod
    def from_dict(cls, value: Mapping) -> "Architecture":
        """From the JSON form of this family; raises InputError for unknown or missing keys."""
        known = ("class", *(field.name for field in fields(cls)))
        for key in value:
            if key not in known:
                todo = near_matches(key, known)
                raise InputError(f"architecture: unknown key {key!r}", todo=todo)
        missing = [key for key in known if key not in value]
        if missing:
            raise InputError("architecture: missing keys", found="no " + ", ".join(missing))
        return cls(**{key: value[key] for key in known[1:]})

    def to_dict(self) -> dict:
        """The JSON form, with FAMILY under "class"."""
        return {"class": self.FAMILY, **asdict(self)}

    @abstractmethod
    def state_shapes(self) -> Shapes:
        """Name -> shape of every parameter and buffer that a checkpoint has; tied ones once."""

    @abstractmethod
    def find_clusters(self) -> List[Cluster]:
        """The weight clusters, made anew; ask `clusters`."""

    @abstractmethod
    def describe(self) -> str:
        """Kind and sizes in one line, for people."""

    def first_difference(self, other: "Architecture") -> Optional[Difference]:
        """What tells another architecture from this one; None when they are equal."""
        mine, theirs = self.to_dict(), other.to_dict()
        for key, value in theirs.items():
            if mine.get(key) != value:
                return key, repr(mine.get(key)), repr(value)
        return None

    def ties(self) -> Dict[str, str]:
        """Tensors that checkpoints may repeat: their name -> the name they are stored under."""
        return {}

    def kept(self) -> Tuple[str, ...]:
        """Matrices that stay float on purpose."""
        return ()

    def reason_against_kernels(self) -> str:
        """Why the CPU kernels cannot run this kind of model; empty when they can."""
        return ""

    def clusters(self) -> List[Cluster]:
        """The weight clusters.

        Raises:
            InputError: a weight matrix is in no cluster and not in `kept`.
        """
        return list(self._clusters)

    def rest(self) -> List[Tuple[str, Tuple[int, ...]]]:
        """Name and shape of what stays float32: biases, norms, buffers, `kept` matrices."""
        covered = {part.parameter for cluster in self._clusters for part in cluster.parts}
        return [(n, s) for n, s in self.state_shapes().items() if n not in covered]

    @cached_property
    def _clusters(self) -> Tuple[Cluster, ...]:
        clusters = tuple(self.find_clusters())
        loose = loose_matrices(self.state_shapes(), clusters, self.kept())
        if loose:
            raise InputError("weight matrices outside every cluster", found=", ".join(loose))
        return clusters

    def _check_sizes(self, **largest: int) -> None:
        """Raise InputError unless every field is a whole number from 1 to its largest."""
        for key, most in largest.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(
                    f"architecture: bad {key}", found=repr(value), expected=f"1 to {most}"
                )
