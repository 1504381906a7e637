"""What a harm is measured on: a model as a chain of stages, and the rows of logits that count."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch

from espnet_mpq.clusters import Cluster

Layer = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Batch:
    """Inputs of a model and which of its output rows are judged.

    Attributes:
        inputs: what the first stage takes: token ids (B, T), frames (B, T, D); anything with
            ``to(device)``.
        mask: bool (B, T) or (B, T, U): the rows that are judged, one sentence per B.
        targets: int64 of the shape of ``mask``; None where the measure needs none.
        weights: float of the shape of ``mask``: what the harm of a row is multiplied by; None: 1.
        counts: float of the shape of ``mask``: how many of the unit (tokens, frames) a row stands
            for when harms are divided by their number; None: 1.
    """

    inputs: Any
    mask: torch.Tensor
    targets: Optional[torch.Tensor] = None
    weights: Optional[torch.Tensor] = None
    counts: Optional[torch.Tensor] = None

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Output (B, T, H) -> the N rows that are judged (N, H)."""
        return x[self.mask]

    @property
    def n_rows(self) -> float:
        """Of the unit that harms are divided by; whole unless ``counts`` says otherwise."""
        return int(self.mask.sum()) if self.counts is None else float(self.row_counts.sum())

    @property
    def row_counts(self) -> torch.Tensor:
        """float64 (N,)."""
        ones = self.mask.new_ones(self.mask.shape) if self.counts is None else self.counts
        return ones[self.mask].double()

    @property
    def row_weights(self) -> Optional[torch.Tensor]:
        """float (N,), None where all are 1."""
        return None if self.weights is None else self.weights[self.mask]

    @property
    def sentence(self) -> torch.Tensor:
        """int64 (N,): the sentence that every row belongs to."""
        return self.mask.nonzero()[:, 0]

    @property
    def row_targets(self) -> Optional[torch.Tensor]:
        """int64 (N,), None without targets."""
        return None if self.targets is None else self.targets[self.mask]

    def to(self, device: torch.device) -> "Batch":
        moved = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if value is None else value.to(device) for value in moved))


@dataclass(frozen=True)
class Stages:
    """The same function as the model's forward pass, cut where activations can be kept.

    Attributes:
        layers: (x, inputs) -> x. The first gets x = inputs; the last gives activations (B, T, H),
            those between may hand on anything.
            Each reads its weights from the model when it is called.
        output: activations of some rows (N, H) -> logits (N, V).
        first: cluster name -> index of the first stage that uses it; len(layers) is the output.
    """

    layers: Sequence[Layer]
    output: Callable[[torch.Tensor], torch.Tensor]
    first: Mapping[str, int]

    def run(self, x: Any, inputs: Any, start: int = 0) -> Any:
        """``x`` entering stage ``start`` -> what enters the output stage."""
        for layer in self.layers[start:]:
            x = layer(x, inputs)
        return x


def whole_model(
    forward: Callable[[torch.Tensor], torch.Tensor], clusters: Iterable[Cluster]
) -> Stages:
    """One stage, the whole forward pass (inputs -> logits (B, T, V)): right for every model."""
    layer = lambda x, inputs: forward(x)  # noqa: E731
    return Stages([layer], lambda logits: logits, {cluster.name: 0 for cluster in clusters})


@dataclass(frozen=True)
class Judged:
    """A model, and the batches on whose rows a harm is measured.

    Attributes:
        module: its weights; in eval mode (dropout off) while a meter measures.
        stages: the forward pass of ``module``.
        batches: one row per sentence; kept in memory.
        unit: of a harm that is summed over rows and divided by their number.
    """

    module: torch.nn.Module
    stages: Stages
    batches: Sequence[Batch]
    unit: str = "nats/token"

    @classmethod
    def of(cls, module, stages: Stages, batches: Iterable[Batch], unit="nats/token") -> "Judged":
        """With the batches on the device of the module."""
        device = next(module.parameters()).device
        return cls(module, stages, [batch.to(device) for batch in batches], unit)

    @property
    def n_rows(self) -> float:
        """Of the unit; see Batch.n_rows."""
        return sum(batch.n_rows for batch in self.batches)

    @property
    def has_targets(self) -> bool:
        return all(batch.targets is not None for batch in self.batches)

    @property
    def n_sentences(self) -> int:
        return sum(len(batch.mask) for batch in self.batches)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in eval mode; afterwards in the mode that it was in."""
        was_training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(was_training)

    def logits(self) -> Iterator[torch.Tensor]:
        """(N, V) of every batch, one after the other."""
        for batch in self.batches:
            yield self.stages.output(batch.rows(self.stages.run(batch.inputs, batch.inputs)))

    def cross_entropy(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Summed over the rows of a batch, in nats."""
        return torch.nn.functional.cross_entropy(logits, batch.row_targets, reduction="sum")
