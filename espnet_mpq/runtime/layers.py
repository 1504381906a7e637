"""Linear layers and embedding rows of a packed LM: on the kernels, or with float weights."""

from __future__ import annotations

from typing import Callable, Dict, Mapping, Tuple

import torch
import torch.nn.functional as F

from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.runtime.packed import PackedModule

# x (..., cols) -> x W^T + bias (..., rows); token ids (...) -> rows of the embedding (..., cols)
Linear = Callable[[torch.Tensor], torch.Tensor]
Rows = Callable[[torch.Tensor], torch.Tensor]


class DenseLayers:
    """Layers with float weights and float activations: the reference.

    Args:
        values: every parameter of the LM by name.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]):
        self.values = values

    def linear(self, *names: str) -> Linear:
        """The layers of these names (without ".weight") as one, their rows stacked."""
        weight = torch.cat([self.values[f"{name}.weight"] for name in names])
        bias = torch.cat([self.values[f"{name}.bias"] for name in names])
        return lambda x: F.linear(x, weight, bias)

    def rows(self, name: str) -> Rows:
        """The rows of the embedding matrix of this name."""
        weight = self.values[f"{name}.weight"]
        return lambda tokens: F.embedding(tokens, weight)


class KernelLayers:
    """Layers that compute from the packed codes on the kernels, with int8 activations.

    Clusters of 16 and 32 bits compute in float there.

    Args:
        runtime: a filled one on the CPU in float32.
    """

    def __init__(self, runtime: PackedModule):
        self.runtime = runtime
        self.parts: Dict[str, Tuple[Cluster, Part]] = {
            part.parameter: (cluster, part)
            for cluster in runtime.architecture.clusters()
            for part in cluster.parts
        }

    def linear(self, *names: str) -> Linear:
        """As DenseLayers.linear; the layers must belong to one cluster."""
        matrix = self._matrix(*names)
        bias = torch.cat([self.runtime.tensor(f"{name}.bias") for name in names])

        def run(x: torch.Tensor) -> torch.Tensor:
            y = matrix.linear(x.reshape(-1, matrix.cols), bias)
            return y.view(*x.shape[:-1], matrix.rows)

        return run

    def rows(self, name: str) -> Rows:
        """As DenseLayers.rows, with the same values."""
        return self._matrix(name).embedding

    def _matrix(self, *names: str) -> KernelMatrix:
        cluster, _ = self.parts[f"{names[0]}.weight"]
        parts = [self.parts[f"{name}.weight"][1] for name in names]
        return self.runtime.matrix(cluster, parts)
