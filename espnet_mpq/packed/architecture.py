"""The shape of a packed LM: what must be known besides the plan to name every tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Dict, List, Mapping, Tuple

from espnet_mpq.clusters import Cluster, find_clusters_in_shapes
from espnet_mpq.errors import InputError, near_matches

N_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
LARGEST = 2**31 - 1
MOST_LAYERS = 1000


@dataclass(frozen=True)
class Architecture:
    """A recurrent LM laid out as ESPnet's SequentialRNNLM: embedding, RNN stack, output layer.

    Sizes are numbers of units; ``unit`` is the embedding width, ``nhid`` the width of the
    hidden state. With ``tie_weights`` the embedding matrix is the output matrix too.
    """

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
        for key in ("vocab_size", "unit", "nhid", "nlayers"):
            value = getattr(self, key)
            largest = MOST_LAYERS if key == "nlayers" else LARGEST
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise InputError(
                    f"architecture: bad {key}", found=repr(value), expected=f"1 to {largest}"
                )
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
    def from_lm_conf(cls, lm_conf: Mapping, vocab_size: int) -> "Architecture":
        """From ESPnet's ``lm_conf`` (its defaults: unit 650, nhid = unit, 2 layers, lstm)."""
        unit = lm_conf.get("unit", 650)
        nhid = lm_conf.get("nhid")
        return cls(
            rnn_type=str(lm_conf.get("rnn_type", "lstm")).lower(),
            vocab_size=vocab_size,
            unit=unit,
            nhid=unit if nhid is None else nhid,
            nlayers=lm_conf.get("nlayers", 2),
            tie_weights=bool(lm_conf.get("tie_weights", False)),
        )

    @classmethod
    def from_dict(cls, value: Mapping) -> "Architecture":
        """From the JSON form; raises InputError for unknown or missing keys."""
        known = ("class", *cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or value.get("class") != "rnn":
            raise InputError(
                "architecture: unknown class",
                found=repr(value.get("class")) if isinstance(value, Mapping) else repr(value),
                expected="'rnn'",
            )
        for key in value:
            if key not in known:
                todo = near_matches(key, known)
                raise InputError(f"architecture: unknown key {key!r}", todo=todo)
        missing = [key for key in known if key not in value]
        if missing:
            raise InputError("architecture: missing keys", found="no " + ", ".join(missing))
        return cls(**{key: value[key] for key in known[1:]})

    def to_dict(self) -> dict:
        return {"class": "rnn", **asdict(self)}

    def lm_conf(self) -> dict:
        """The sizes as ``lm_conf`` keys of ESPnet (vocab_size comes from the token list)."""
        return {k: v for k, v in asdict(self).items() if k != "vocab_size"}

    def parameter_shapes(self) -> Dict[str, Tuple[int, ...]]:
        """Parameter name -> shape in ESPnet's order; a tied matrix appears once."""
        gates = N_GATES[self.rnn_type]
        rows = gates * self.nhid
        shapes: Dict[str, Tuple[int, ...]] = {"encoder.weight": (self.vocab_size, self.unit)}
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

    def clusters(self) -> List[Cluster]:
        """The weight clusters, as find_clusters gives for the float LM."""
        return list(_clusters(self))

    def rest(self) -> List[Tuple[str, Tuple[int, ...]]]:
        """Name and shape of the parameters that stay float32."""
        covered = {part.parameter for cluster in _clusters(self) for part in cluster.parts}
        return [(n, s) for n, s in self.parameter_shapes().items() if n not in covered]


@lru_cache(maxsize=64)
def _clusters(architecture: Architecture) -> Tuple[Cluster, ...]:
    return tuple(find_clusters_in_shapes(architecture.parameter_shapes()))
