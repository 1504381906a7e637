"""Transformer language models: embedding, blocks of attention and feed-forward, output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, List, Optional

from espnet_mpq.architecture.base import LARGEST_SIZE, Architecture, Shapes
from espnet_mpq.architecture.rnn_lm import MOST_LAYERS
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError

POS_ENCS = (None, "sinusoidal")
ATTENTION = tuple(f"self_attn.linear_{letter}" for letter in ("q", "k", "v", "out"))
FEED_FORWARD = ("feed_forward.w_1", "feed_forward.w_2")


@dataclass(frozen=True)
class TransformerArchitecture(Architecture):
    """A Transformer LM laid out as ESPnet's TransformerLM.

    Embedding of ``embed_unit`` numbers, a linear layer to ``att_unit``, ``layer`` blocks of
    self-attention with ``head`` heads and a feed-forward sublayer of ``unit`` hidden numbers, both
    normalised at their input, output layer. ``pos_enc`` is None (no positions) or "sinusoidal".
    """

    FAMILY: ClassVar[str] = "transformer"

    pos_enc: Optional[str]
    vocab_size: int
    embed_unit: int
    att_unit: int
    head: int
    unit: int
    layer: int

    def __post_init__(self):
        if self.pos_enc not in POS_ENCS:
            raise InputError(
                "architecture: unknown pos_enc",
                found=repr(self.pos_enc),
                expected="one of " + ", ".join(map(repr, POS_ENCS)),
            )
        names = ("vocab_size", "embed_unit", "att_unit", "head", "unit")
        sizes = dict.fromkeys(names, LARGEST_SIZE)
        self._check_sizes(**sizes, layer=MOST_LAYERS)
        if self.att_unit % self.head or (self.pos_enc and self.att_unit % 2):
            raise InputError(
                "architecture: bad att_unit",
                found=f"att_unit {self.att_unit}, head {self.head}, pos_enc {self.pos_enc}",
                expected="a multiple of head; with sinusoidal positions an even number",
            )

    def state_shapes(self) -> Shapes:
        width = self.att_unit
        shapes: Shapes = {"embed.weight": (self.vocab_size, self.embed_unit)}

        def linear(name: str, rows: int, cols: int) -> None:
            shapes.update({f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)})

        def norm(name: str) -> None:
            shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

        linear("encoder.embed.0", width, self.embed_unit)
        norm("encoder.embed.1")
        for block in range(self.layer):
            prefix = f"encoder.encoders.{block}"
            for name in ATTENTION:
                linear(f"{prefix}.{name}", width, width)
            linear(f"{prefix}.feed_forward.w_1", self.unit, width)
            linear(f"{prefix}.feed_forward.w_2", width, self.unit)
            norm(f"{prefix}.norm1")
            norm(f"{prefix}.norm2")
        norm("encoder.after_norm")
        linear("decoder", self.vocab_size, width)
        return shapes

    def find_clusters(self) -> List[Cluster]:
        """Embedding with the linear layer behind it, both sublayers of every block, output.

        Source: own; granularity of Xu et al. 2021 (TASLP, arXiv 2112.11438), Fig. 6.
        """
        shapes = self.state_shapes()

        def cluster(name: str, kind: str, *modules: str) -> Cluster:
            names = [f"{module}.weight" for module in modules]
            return Cluster(name, kind, tuple(Part.whole(n, shapes[n]) for n in names))

        clusters = [cluster("embedding", "embedding", "embed", "encoder.embed.0")]
        for block in range(self.layer):
            for kind, modules in (("attention", ATTENTION), ("feed_forward", FEED_FORWARD)):
                names = [f"encoder.encoders.{block}.{module}" for module in modules]
                clusters.append(cluster(f"blocks.{block}.{kind}", kind, *names))
        return [*clusters, cluster("output", "output", "decoder")]

    def describe(self) -> str:
        sizes = f"{self.layer} x {self.att_unit}, {self.head} heads, feed-forward {self.unit}"
        positions = f", {self.pos_enc} positions" if self.pos_enc else ""
        vocabulary = f"embedding {self.embed_unit}, {self.vocab_size} tokens"
        return f"{self.FAMILY}, {sizes}, {vocabulary}{positions}"
