"""The host's names for every kind of LM (float, trained, searched, packed) and its sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Callable, Dict, Mapping, Optional, Sequence, Tuple

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.architecture.rnn_lm import RnnArchitecture
from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.errors import InputError
from espnet_mpq.vocabulary import Vocabulary

# Keys of config.yaml: the class of an LM, its sizes.
OPTION, CONF = "lm", "lm_conf"
PREFIX = "lm."  # of its weights in a checkpoint: where ESPnetLanguageModel keeps it


def _rnn(conf: Mapping, vocab_size: int) -> RnnArchitecture:
    unit = conf.get("unit", 650)
    nhid = conf.get("nhid")
    return RnnArchitecture(
        rnn_type=str(conf.get("rnn_type", "lstm")).lower(),
        vocab_size=vocab_size,
        unit=unit,
        nhid=unit if nhid is None else nhid,
        nlayers=conf.get("nlayers", 2),
        tie_weights=conf.get("tie_weights", False),
    )


def _transformer(conf: Mapping, vocab_size: int) -> TransformerArchitecture:
    return TransformerArchitecture(
        pos_enc=conf.get("pos_enc"),
        vocab_size=vocab_size,
        embed_unit=conf.get("embed_unit", 128),
        att_unit=conf.get("att_unit", 256),
        head=conf.get("head", 2),
        unit=conf.get("unit", 1024),
        layer=conf.get("layer", 4),
    )


@dataclass(frozen=True)
class Family:
    """One kind of LM of the host; names are those of ``lm`` in config.yaml, in lower case.

    Attributes:
        architecture: the class of its shape.
        sizes: (conf, vocab_size) -> architecture; missing keys mean the host's defaults.
        fp, trained, nas, packed: the host's own class, ours that trains with a plan, the
            super-network, the one that runs packed files.
        dropouts: keys of lm_conf that change the training and not the LM.
        classes: name -> (module in hosts/espnet, class) of our own.
    """

    architecture: type
    sizes: Callable[[Mapping, int], Architecture]
    fp: str
    trained: str
    nas: str
    packed: str
    dropouts: Tuple[str, ...]
    classes: Mapping[str, Tuple[str, str]]

    @property
    def floats(self) -> Tuple[str, str]:
        """Names of the LMs with float weights that a packed file can be made of."""
        return self.fp, self.trained

    @property
    def names(self) -> Tuple[str, ...]:
        return self.fp, self.trained, self.nas, self.packed


FAMILIES = (
    Family(
        RnnArchitecture,
        _rnn,
        fp="seq_rnn",
        trained="mpq_seq_rnn",
        nas="mpq_nas_seq_rnn",
        packed="mpq_packed_rnn",
        dropouts=("dropout_rate",),
        classes={
            "mpq_seq_rnn": ("lm.rnn", "MpqSequentialRNNLM"),
            "mpq_nas_seq_rnn": ("lm.nas", "MpqNasSequentialRNNLM"),
            "mpq_packed_rnn": ("lm.packed_rnn", "MpqPackedRNNLM"),
        },
    ),
    Family(
        TransformerArchitecture,
        _transformer,
        fp="transformer",
        trained="mpq_transformer",
        nas="mpq_nas_transformer",
        packed="mpq_packed_transformer",
        dropouts=("dropout_rate", "positional_dropout_rate", "attention_dropout_rate"),
        classes={
            "mpq_transformer": ("lm.transformer", "MpqTransformerLM"),
            "mpq_nas_transformer": ("lm.nas", "MpqNasTransformerLM"),
            "mpq_packed_transformer": ("lm.packed_transformer", "MpqPackedTransformerLM"),
        },
    ),
)
CLASSES = {name: place for family in FAMILIES for name, place in family.classes.items()}
FLOATS = tuple(name for family in FAMILIES for name in family.floats)
PACKED = tuple(family.packed for family in FAMILIES)


def find_family(name: object) -> Optional[Family]:
    """The family of the host's LM class ``name``, in any case; None for another one."""
    name = str(name).lower()
    return next((family for family in FAMILIES if name in family.names), None)


def is_packed(name: object) -> bool:
    """Whether an LM class of the host, by its name, runs packed files."""
    return str(name).lower() in PACKED


def is_ours(name: object) -> bool:
    """Whether an LM class of the host, by its name, is one of this package."""
    return str(name).lower() in CLASSES


def architecture_of(name: object, conf: Mapping, vocab_size: int) -> Architecture:
    """The shape of an LM from what config.yaml says of it.

    Args:
        name: of the class, ``lm`` in config.yaml.
        conf: ``lm_conf``; keys that do not change the shape (dropout, plan) are passed over.
        vocab_size: length of the token list.

    Raises:
        InputError: an LM that no packed file can hold, or sizes that cannot be.
    """
    family = find_family(name)
    if family is None:
        raise InputError(
            "no packed file can hold this LM",
            found=f"lm: {name}",
            expected="one of " + ", ".join(known for f in FAMILIES for known in f.names),
        )
    return family.sizes(conf, vocab_size)


def family_of(architecture: Architecture) -> Family:
    """The host's family of an architecture; raises InputError for one that is no LM here."""
    for family in FAMILIES:
        if isinstance(architecture, family.architecture):
            return family
    raise InputError("this is no LM of ESPnet", found=architecture.describe())


def conf_of(architecture: Architecture) -> Dict[str, object]:
    """The sizes as ``lm_conf`` keys (vocab_size comes from the token list)."""
    return {k: v for k, v in asdict(architecture).items() if k != "vocab_size"}


def vocabulary(tokens: Sequence[str]) -> Vocabulary:
    """With the ids that the host gives: blank first, sos = eos last, unk by its name."""
    tokens = tuple(tokens)
    last = len(tokens) - 1
    unk = tokens.index("<unk>") if "<unk>" in tokens else None
    return Vocabulary(tokens, {"blank": 0, "unk": unk, "sos": last, "eos": last})
