"""The shape of a packed LM: what must be known besides the plan to name every tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import ClassVar, Dict, List, Mapping, Optional, Tuple

from espnet_mpq.clusters import Cluster, find_clusters_in_shapes
from espnet_mpq.errors import InputError, near_matches

Shapes = Dict[str, Tuple[int, ...]]
POS_ENCS = (None, "sinusoidal")
N_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
LARGEST = 2**31 - 1
MOST_LAYERS = 1000


class Architecture(ABC):
    """One kind of LM with its sizes; subclasses are frozen dataclasses.

    FAMILY names the kind in packed files. FLOAT_LMS are the names of the host's LM classes
    (``lm`` of config.yaml) with float weights that have this shape, TRAINED_LM is the one of
    them that trains with a plan, PACKED_LM the one that runs packed files.
    """

    FAMILY: ClassVar[str]
    FLOAT_LMS: ClassVar[Tuple[str, ...]]
    TRAINED_LM: ClassVar[str]
    PACKED_LM: ClassVar[str]
    vocab_size: int

    @classmethod
    def from_lm_conf(cls, lm_conf: Mapping, vocab_size: int, lm: str) -> "Architecture":
        """From what the host's config.yaml says of an LM, float or packed.

        Args:
            lm_conf: as in config.yaml; missing keys mean the host's defaults, keys that do not
                change the shape (dropout, plan) are passed over.
            vocab_size: length of the token list.
            lm: the host's name of the LM class, in any case.

        Raises:
            InputError: an LM that no packed file can hold, or sizes that cannot be.
        """
        return family_of_lm(lm)._from_lm_conf(lm_conf, vocab_size)

    @classmethod
    def from_dict(cls, value: Mapping) -> "Architecture":
        """From the JSON form; raises InputError for an unknown family, unknown or missing keys."""
        name = value.get("class") if isinstance(value, Mapping) else value
        for family in FAMILIES:
            if name == family.FAMILY:
                break
        else:
            raise InputError(
                "architecture: unknown class",
                found=repr(name),
                expected=" or ".join(repr(family.FAMILY) for family in FAMILIES),
            )
        known = ("class", *(field.name for field in fields(family)))
        for key in value:
            if key not in known:
                todo = near_matches(key, known)
                raise InputError(f"architecture: unknown key {key!r}", todo=todo)
        missing = [key for key in known if key not in value]
        if missing:
            raise InputError("architecture: missing keys", found="no " + ", ".join(missing))
        return family(**{key: value[key] for key in known[1:]})

    def to_dict(self) -> dict:
        return {"class": self.FAMILY, **asdict(self)}

    def lm_conf(self) -> dict:
        """The sizes as ``lm_conf`` keys of ESPnet (vocab_size comes from the token list)."""
        return {k: v for k, v in asdict(self).items() if k != "vocab_size"}

    @abstractmethod
    def parameter_shapes(self) -> Shapes:
        """Parameter name -> shape in ESPnet's order; a tied matrix appears once."""

    @abstractmethod
    def describe(self) -> str:
        """Kind and sizes in one line, for people."""

    def ties(self) -> Dict[str, str]:
        """Parameters that checkpoints may repeat: their name -> the name they are stored under."""
        return {}

    def clusters(self) -> List[Cluster]:
        """The weight clusters, as find_clusters gives for the float LM."""
        return list(_clusters(self))

    def rest(self) -> List[Tuple[str, Tuple[int, ...]]]:
        """Name and shape of the parameters that stay float32."""
        covered = {part.parameter for cluster in _clusters(self) for part in cluster.parts}
        return [(n, s) for n, s in self.parameter_shapes().items() if n not in covered]

    def _check_sizes(self, **largest: int) -> None:
        """Raise InputError unless every field is a whole number from 1 to its largest."""
        for key, most in largest.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(
                    f"architecture: bad {key}", found=repr(value), expected=f"1 to {most}"
                )


@lru_cache(maxsize=64)
def _clusters(architecture: Architecture) -> Tuple[Cluster, ...]:
    return tuple(find_clusters_in_shapes(architecture.parameter_shapes()))


@dataclass(frozen=True)
class RnnArchitecture(Architecture):
    """A recurrent LM laid out as ESPnet's SequentialRNNLM: embedding, RNN stack, output layer.

    Sizes are numbers of units; ``unit`` is the embedding width, ``nhid`` the width of the
    hidden state. With ``tie_weights`` the embedding matrix is the output matrix too.
    """

    FAMILY: ClassVar[str] = "rnn"
    FLOAT_LMS: ClassVar[Tuple[str, ...]] = ("seq_rnn", "mpq_seq_rnn")
    TRAINED_LM: ClassVar[str] = "mpq_seq_rnn"
    PACKED_LM: ClassVar[str] = "mpq_packed_rnn"

    rnn_type: str
    vocab_size: int
    unit: int
    nhid: int
    nlayers: int
    tie_weights: bool

    def __post_init__(self):
        if self.rnn_type not in N_GATES:
            raise InputError(
                "architecture: unknown rnn_type",
                found=repr(self.rnn_type),
                expected="one of " + ", ".join(N_GATES),
            )
        self._check_sizes(vocab_size=LARGEST, unit=LARGEST, nhid=LARGEST, nlayers=MOST_LAYERS)
        if not isinstance(self.tie_weights, bool):
            raise InputError(
                "architecture: bad tie_weights", found=repr(self.tie_weights), expected="a boolean"
            )
        if self.tie_weights and self.unit != self.nhid:
            raise InputError(
                "architecture: tie_weights needs nhid equal to unit",
                found=f"unit {self.unit}, nhid {self.nhid}",
            )

    @classmethod
    def _from_lm_conf(cls, lm_conf: Mapping, vocab_size: int) -> "RnnArchitecture":
        unit = lm_conf.get("unit", 650)
        nhid = lm_conf.get("nhid")
        return cls(
            rnn_type=str(lm_conf.get("rnn_type", "lstm")).lower(),
            vocab_size=vocab_size,
            unit=unit,
            nhid=unit if nhid is None else nhid,
            nlayers=lm_conf.get("nlayers", 2),
            tie_weights=lm_conf.get("tie_weights", False),
        )

    def parameter_shapes(self) -> Shapes:
        rows = N_GATES[self.rnn_type] * self.nhid
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

    def describe(self) -> str:
        tied = ", tied" if self.tie_weights else ""
        sizes = f"{self.nlayers} x {self.nhid}, embedding {self.unit}"
        return f"{self.rnn_type}, {sizes}, {self.vocab_size} tokens{tied}"

    def ties(self) -> Dict[str, str]:
        return {"decoder.weight": "encoder.weight"} if self.tie_weights else {}


@dataclass(frozen=True)
class TransformerArchitecture(Architecture):
    """A Transformer LM laid out as ESPnet's TransformerLM.

    Embedding of ``embed_unit`` numbers, a linear layer to ``att_unit``, ``layer`` blocks of
    self-attention with ``head`` heads and a feed-forward sublayer of ``unit`` hidden numbers, both
    normalised at their input, output layer. ``pos_enc`` is None (no positions) or "sinusoidal".
    """

    FAMILY: ClassVar[str] = "transformer"
    FLOAT_LMS: ClassVar[Tuple[str, ...]] = ("transformer", "mpq_transformer")
    TRAINED_LM: ClassVar[str] = "mpq_transformer"
    PACKED_LM: ClassVar[str] = "mpq_packed_transformer"

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
        sizes = dict.fromkeys(("vocab_size", "embed_unit", "att_unit", "head", "unit"), LARGEST)
        self._check_sizes(**sizes, layer=MOST_LAYERS)
        if self.att_unit % self.head or (self.pos_enc and self.att_unit % 2):
            raise InputError(
                "architecture: bad att_unit",
                found=f"att_unit {self.att_unit}, head {self.head}, pos_enc {self.pos_enc}",
                expected="a multiple of head; with sinusoidal positions an even number",
            )

    @classmethod
    def _from_lm_conf(cls, lm_conf: Mapping, vocab_size: int) -> "TransformerArchitecture":
        return cls(
            pos_enc=lm_conf.get("pos_enc"),
            vocab_size=vocab_size,
            embed_unit=lm_conf.get("embed_unit", 128),
            att_unit=lm_conf.get("att_unit", 256),
            head=lm_conf.get("head", 2),
            unit=lm_conf.get("unit", 1024),
            layer=lm_conf.get("layer", 4),
        )

    def parameter_shapes(self) -> Shapes:
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
            for letter in ("q", "k", "v", "out"):
                linear(f"{prefix}.self_attn.linear_{letter}", width, width)
            linear(f"{prefix}.feed_forward.w_1", self.unit, width)
            linear(f"{prefix}.feed_forward.w_2", width, self.unit)
            norm(f"{prefix}.norm1")
            norm(f"{prefix}.norm2")
        norm("encoder.after_norm")
        linear("decoder", self.vocab_size, width)
        return shapes

    def describe(self) -> str:
        sizes = f"{self.layer} x {self.att_unit}, {self.head} heads, feed-forward {self.unit}"
        positions = f", {self.pos_enc} positions" if self.pos_enc else ""
        vocabulary = f"embedding {self.embed_unit}, {self.vocab_size} tokens"
        return f"{self.FAMILY}, {sizes}, {vocabulary}{positions}"


FAMILIES = (RnnArchitecture, TransformerArchitecture)


def family_of_lm(lm: str) -> type:
    """The Architecture class of the host's LM class ``lm``; raises InputError for another."""
    name = str(lm).lower()
    for family in FAMILIES:
        if name in family.FLOAT_LMS or name == family.PACKED_LM:
            return family
    known = [name for family in FAMILIES for name in (*family.FLOAT_LMS, family.PACKED_LM)]
    raise InputError(
        "no packed file can hold this LM",
        found=f"lm: {lm}",
        expected="one of " + ", ".join(known),
    )
