"""The gates of a recurrent layer as clusters: input and recurrent rows together."""

from __future__ import annotations

from typing import List

from espnet_mpq.architecture.base import Shapes
from espnet_mpq.clusters import Cluster, Part

# PyTorch stacks the gates of a layer along the rows of weight_ih / weight_hh in this order.
GATES = {"lstm": "ifgo", "gru": "rzn", "rnn_tanh": "h", "rnn_relu": "h"}


def gate_clusters(
    name: str, shapes: Shapes, prefix: str, suffix: str, rnn_type: str
) -> List[Cluster]:
    """One cluster per gate of the layer with ``{prefix}weight_ih{suffix}`` and ``weight_hh``.

    Args:
        name: of the layer; its clusters are ``name.i``, ``name.f``, ...
    """
    parameters = [f"{prefix}weight_{kind}{suffix}" for kind in ("ih", "hh")]
    gates = GATES[rnn_type]
    clusters = []
    for k, gate in enumerate(gates):
        parts = []
        for parameter in parameters:
            rows, cols = shapes[parameter]
            size = rows // len(gates)
            parts.append(Part(parameter, k * size, (k + 1) * size, cols))
        clusters.append(Cluster(f"{name}.{gate}", "gate", tuple(parts)))
    return clusters
