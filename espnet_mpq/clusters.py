"""Weight clusters: which parts of which parameters of an LM share one bit-width."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import torch

from espnet_mpq.errors import InputError

# PyTorch stacks the gates of a layer along the rows of weight_ih / weight_hh in this order.
GATES = {4: "ifgo", 3: "rzn", 1: "h"}
# Module inside a Transformer block of the host -> kind of its cluster.
SUBLAYERS = {"self_attn": "attention", "feed_forward": "feed_forward"}
_SUBLAYER = re.compile(r"encoder\.encoders\.(\d+)\.(self_attn|feed_forward)\.")


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of one 2-D parameter (name relative to the LM module)."""

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


@dataclass(frozen=True)
class Cluster:
    """What gets one bit-width; kind: embedding, gate, attention, feed_forward or output."""

    name: str
    kind: str
    parts: Tuple[Part, ...]

    @property
    def n_weights(self) -> int:
        return sum(part.n_weights for part in self.parts)


def unique_parameters(lm: torch.nn.Module) -> Dict[str, torch.nn.Parameter]:
    """Parameters by name; a tied parameter appears once, under its first name."""
    return dict(lm.named_parameters())


def find_clusters(lm: torch.nn.Module) -> List[Cluster]:
    """Find the clusters of an LM from the names and shapes of its parameters.

    Known layouts: ESPnet's SequentialRNNLM (``encoder``, ``rnn``, ``decoder``; LSTM, GRU
    and plain RNN) and ESPnet's TransformerLM (``embed``, ``encoder.encoders.N``,
    ``decoder``). A tied embedding/output is the one cluster ``embedding``.

    Args:
        lm: the LM module itself (not the ESPnet model around it).

    Raises:
        InputError: no layout fits, or a weight matrix belongs to no cluster.

    Source: own; granularity of Xu et al. 2021 (TASLP, arXiv 2112.11438), Fig. 6.
    """
    shapes = {name: tuple(p.shape) for name, p in unique_parameters(lm).items()}
    return find_clusters_in_shapes(shapes)


def find_clusters_in_shapes(shapes: Dict[str, Tuple[int, ...]]) -> List[Cluster]:
    """As find_clusters, from {parameter name: shape} with tied parameters listed once."""
    if "rnn.weight_ih_l0" in shapes:
        clusters = _rnn_clusters(shapes)
    elif any(name.startswith("encoder.encoders.0.") for name in shapes):
        clusters = _transformer_clusters(shapes)
    else:
        raise InputError(
            "no known language model layout",
            found=", ".join(list(shapes)[:6]) or "no parameters",
            expected="parameters named as in ESPnet's seq_rnn or transformer LM",
        )
    covered = {part.parameter for cluster in clusters for part in cluster.parts}
    loose = [n for n, s in shapes.items() if len(s) >= 2 and n not in covered]
    if loose:
        raise InputError("weight matrices outside every cluster", found=", ".join(loose))
    return clusters


def _whole(shapes, name: str) -> Part:
    rows, cols = shapes[name]
    return Part(name, 0, rows, cols)


def _rnn_clusters(shapes) -> List[Cluster]:
    clusters = [Cluster("embedding", "embedding", (_whole(shapes, "encoder.weight"),))]
    layer = 0
    while f"rnn.weight_ih_l{layer}" in shapes:
        names = [f"rnn.weight_ih_l{layer}", f"rnn.weight_hh_l{layer}"]
        rows, hidden = shapes[names[1]]
        gates = GATES.get(rows // hidden)
        if gates is None or rows % hidden:
            raise InputError(f"{names[1]} has an unknown gate layout", found=shapes[names[1]])
        for k, gate in enumerate(gates):
            parts = tuple(Part(n, k * hidden, (k + 1) * hidden, shapes[n][1]) for n in names)
            clusters.append(Cluster(f"rnn.l{layer}.{gate}", "gate", parts))
        layer += 1
    if "decoder.weight" in shapes:
        clusters.append(Cluster("output", "output", (_whole(shapes, "decoder.weight"),)))
    return clusters


def _transformer_clusters(shapes) -> List[Cluster]:
    embedding = [n for n in shapes if re.fullmatch(r"embed\.weight|encoder\.embed\.\d+\.weight", n)]
    inputs = [n for n in embedding if len(shapes[n]) == 2]
    clusters = [Cluster("embedding", "embedding", tuple(_whole(shapes, n) for n in inputs))]
    sublayers: Dict[Tuple[int, str], List[Part]] = {}
    for name, shape in shapes.items():
        found = _SUBLAYER.match(name)
        if found and len(shape) == 2:
            key = int(found.group(1)), SUBLAYERS[found.group(2)]
            sublayers.setdefault(key, []).append(_whole(shapes, name))
    for (block, kind), parts in sorted(sublayers.items()):
        clusters.append(Cluster(f"blocks.{block}.{kind}", kind, tuple(parts)))
    if "decoder.weight" in shapes:
        clusters.append(Cluster("output", "output", (_whole(shapes, "decoder.weight"),)))
    return clusters


def rest_parameters(lm: torch.nn.Module, clusters: Sequence[Cluster]) -> List[Tuple[str, tuple]]:
    """Name and shape of the parameters that stay float (biases, norms), tied ones once."""
    covered = {part.parameter for cluster in clusters for part in cluster.parts}
    return [(n, tuple(p.shape)) for n, p in unique_parameters(lm).items() if n not in covered]


def get_mats(lm: torch.nn.Module, cluster: Cluster) -> List[torch.Tensor]:
    """The weights of a cluster as detached (rows, cols) views, one per part."""
    parameters = unique_parameters(lm)
    return [parameters[p.parameter].detach()[p.start : p.stop] for p in cluster.parts]


def set_mats(lm: torch.nn.Module, cluster: Cluster, mats: Sequence[torch.Tensor]) -> None:
    """Overwrite the weights of a cluster in place; ``mats`` as returned by get_mats."""
    with torch.no_grad():
        for view, mat in zip(get_mats(lm, cluster), mats):
            view.copy_(mat)
