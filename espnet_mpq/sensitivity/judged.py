"""What a harm is measured on: a model as a chain of stages, and the rows of logits that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch

from espnet_mpq.clusters import Cluster

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs of a model and which of its output rows count.

    Attributes:
        inputs: what the first stage takes: token ids (B, T), frames (B, T, D).
        mask: bool (B, T) or (B, T, U): the rows that count, one sentence per B.
        targets: int64 of the shape of ``mask``; None where the measure needs none.
    """

    inputs: torch.Tensor
    mask: torch.Tensor
    targets: Optional[torch.Tensor] = None

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Output (B, T, H) -> the N rows that count (N, H)."""
        return x[self.mask]

    @property
    def n_rows(self) -> int:
        return int(self.mask.sum())

    @property
    def sentence(self) -> torch.Tensor:
        """int64 (N,): the sentence that every row belongs to."""
        return self.mask.nonzero()[:, 0]

    @property
    def row_targets(self) -> Optional[torch.Tensor]:
        """int64 (N,), None without targets."""
        return None if self.targets is None else self.targets[self.mask]

    def to(self, device: torch.device) -> "Batch":
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(self.inputs.to(device), self.mask.to(device), targets)


@dataclass(frozen=True)
class Stages:
    """The same function as the model's forward pass, cut where activations can be kept.

    Attributes:
        layers: (x, inputs) -> x. The first gets x = inputs; the others activations (B, T, H).
            Each reads its weights from the model when it is called.
        output: activations of some rows (N, H) -> logits (N, V).
        first: cluster name -> index of the first stage that uses it; len(layers) is the output.
    """

    layers: Sequence[Layer]
    output: Callable[[torch.Tensor], torch.Tensor]
    first: Mapping[str, int]

    def run(self, x: torch.Tensor, inputs: torch.Tensor, start: int = 0) -> torch.Tensor:
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
    def n_rows(self) -> int:
        return sum(batch.n_rows for batch in self.batches)

    @property
    def n_sentences(self) -> int:
        return sum(len(batch.mask) for batch in self.batches)

    def logits(self) -> Iterator[torch.Tensor]:
        """(N, V) of every batch, one after the other."""
        for batch in self.batches:
            yield self.stages.output(batch.rows(self.stages.run(batch.inputs, batch.inputs)))

    def cross_entropy(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Summed over the rows of a batch, in nats."""
        return torch.nn.functional.cross_entropy(logits, batch.row_targets, reduction="sum")
