"""Recurrent language models: embedding, LSTM, GRU or plain RNN, output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Dict, List

from espnet_mpq.architecture.base import LARGEST_SIZE, Architecture, Shapes
from espnet_mpq.architecture.gates import GATES, gate_clusters
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError

MOST_LAYERS = 1000


@dataclass(frozen=True)
class RnnArchitecture(Architecture):
    """A recurrent LM laid out as ESPnet's SequentialRNNLM: embedding, RNN stack, output layer.

    Sizes are numbers of units; ``unit`` is the embedding width, ``nhid`` the width of the
    hidden state. With ``tie_weights`` the embedding matrix is the output matrix too.
    """

    FAMILY: ClassVar[str] = "rnn"

    rnn_type: str
    vocab_size: int
    unit: int
    nhid: int
    nlayers: int
    tie_weights: bool

    def __post_init__(self):
        if self.rnn_type not in GATES:
            raise InputError(
                "architecture: unknown rnn_type",
                found=repr(self.rnn_type),
                expected="one of " + ", ".join(GATES),
            )
        sizes = dict.fromkeys(("vocab_size", "unit", "nhid"), LARGEST_SIZE)
        self._check_sizes(**sizes, nlayers=MOST_LAYERS)
        if not isinstance(self.tie_weights, bool):
            raise InputError(
                "architecture: bad tie_weights", found=repr(self.tie_weights), expected="a boolean"
            )
        if self.tie_weights and self.unit != self.nhid:
            raise InputError(
                "architecture: tie_weights needs nhid equal to unit",
                found=f"unit {self.unit}, nhid {self.nhid}",
            )

    def state_shapes(self) -> Shapes:
        rows = len(GATES[self.rnn_type]) * self.nhid
        shapes: Shapes = {"encoder.weight": (self.vocab_size, self.unit)}
        for layer in range(self.nlayers):
            cols = self.unit if layer == 0 else self.nhid
            shapes[f"rnn.weight_ih_l{layer}"] = (rows, cols)
            shapes[f"rnn.weight_hh_l{layer}"] = (rows, self.nhid)
            shapes[f"rnn.bias_ih_l{layer}"] = (rows,)
            shapes[f"rnn.bias_hh_l{layer}"] = (rows,)
        if not self.tie_weights:
            shapes["decoder.weight"] = (self.vocab_size, self.nhid)
        shapes["decoder.bias"] = (self.vocab_size,)
        return shapes

    def find_clusters(self) -> List[Cluster]:
        """Embedding (the output layer too when they are tied), every gate of a layer, output.

        Source: own; granularity of Xu et al. 2021 (TASLP, arXiv 2112.11438), Fig. 6.
        """
        shapes = self.state_shapes()
        embedding = Part.whole("encoder.weight", shapes["encoder.weight"])
        clusters = [Cluster("embedding", "embedding", (embedding,))]
        for layer in range(self.nlayers):
            clusters += gate_clusters(f"rnn.l{layer}", shapes, "rnn.", f"_l{layer}", self.rnn_type)
        if not self.tie_weights:
            output = Part.whole("decoder.weight", shapes["decoder.weight"])
            clusters.append(Cluster("output", "output", (output,)))
        return clusters

    def reason_against_kernels(self) -> str:
        return "" if self.rnn_type == "lstm" else f"no kernels for {self.rnn_type}"

    def describe(self) -> str:
        tied = ", tied" if self.tie_weights else ""
        sizes = f"{self.nlayers} x {self.nhid}, embedding {self.unit}"
        return f"{self.rnn_type}, {sizes}, {self.vocab_size} tokens{tied}"

    def ties(self) -> Dict[str, str]:
        return {"decoder.weight": "encoder.weight"} if self.tie_weights else {}
