"""An LM as a chain of stages, so that what lies below a changed cluster is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Mapping, Sequence

import torch

from espnet_mpq.clusters import Cluster

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Stages:
    """The same function as the LM's forward pass, cut where activations can be kept.

    Attributes:
        layers: (x, inputs) -> x. The first gets x = inputs, int64 ids (B, T); the others
            activations (B, T, H). Each reads its weights from the LM when it is called.
        output: activations of some tokens (N, H) -> logits (N, V).
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


def whole_lm(
    forward: Callable[[torch.Tensor], torch.Tensor], clusters: Sequence[Cluster]
) -> Stages:
    """One stage, the whole forward pass (ids (B, T) -> logits (B, T, V)): right for every LM."""
    layer = lambda x, inputs: forward(x)  # noqa: E731
    return Stages([layer], lambda logits: logits, {cluster.name: 0 for cluster in clusters})
