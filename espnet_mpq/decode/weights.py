"""weights.json: how much every part of a total counts, and what that was tuned on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.io import read_json, write_json

FORMAT_NAME, VERSION = "espnet_mpq.rescoring_weights", 1
SCORES = ("sum", "mean", "rank")
TOKENS = ("text", "nbest")


@dataclasses.dataclass
class Weights:
    """The total is the sum of weight times part (rescore.py).

    Attributes:
        weights: part -> weight; a part is a score of the first pass, an LM, or "length".
        score: what the scores of the lists are, as rescore.first_pass_parts.
        tokens: what LMs score, words through their own tokenizer ("text") or the tokens of the
            first pass ("nbest").
        share: of the LM in the word by word interpolation with an n-gram LM; None without one.
        lms: part -> identity of the LM it was tuned for.
        tuned: what the tuning found: errors, WER, number of utterances; None by hand.
        dev_utts: utterances it was tuned on.
        provenance: tool version, command line and input files.
    """

    weights: Dict[str, float]
    score: str = "sum"
    tokens: str = "text"
    share: Optional[float] = None
    lms: Dict[str, dict] = dataclasses.field(default_factory=dict)
    tuned: Optional[dict] = None
    dev_utts: List[str] = dataclasses.field(default_factory=list)
    provenance: Optional[dict] = None

    def __post_init__(self):
        for name, value, known in (("score", self.score, SCORES), ("tokens", self.tokens, TOKENS)):
            if value not in known:
                raise InputError(
                    f"{name} {value!r} of the weights", todo=near_matches(value, known)
                )
        if self.share is not None and not 0.0 <= self.share <= 1.0:
            raise InputError("the share of the LM", found=self.share, expected="0 to 1")
        for name, weight in self.weights.items():
            is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not is_number or not math.isfinite(weight):
                raise InputError(f"the weight of {name}", found=weight, expected="a finite number")

    def overlap(self, utts: Sequence[str]) -> List[str]:
        """Those of ``utts`` that the weights were tuned on."""
        tuned_on = set(self.dev_utts)
        return [utt for utt in utts if utt in tuned_on]

    def save(self, path: Union[str, Path]) -> None:
        """Write the file, atomically."""
        value = dataclasses.asdict(self)
        # One line: nobody reads it, and it is long.
        value["dev_utts"] = " ".join(self.dev_utts)
        write_json(path, {"format": FORMAT_NAME, "version": VERSION, **value})


def load_weights(path: Union[str, Path]) -> Weights:
    """Read weights.json; one written by hand needs no more than {"weights": {part: weight}}.

    Raises:
        InputError: no such file, unknown keys (with near matches), or values that cannot be.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("weights"), dict):
        raise InputError(f"{path} holds no weights", expected='{"weights": {"lm": 0.5, ...}}')
    value = dict(value)
    found = value.pop("format", FORMAT_NAME), value.pop("version", VERSION)
    if found != (FORMAT_NAME, VERSION):
        raise InputError(
            f"{path} is of another kind or version", found=found, expected=(FORMAT_NAME, VERSION)
        )
    known = [field.name for field in dataclasses.fields(Weights)]
    for key in value:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}", todo=near_matches(key, known))
    if "dev_utts" in value:
        value["dev_utts"] = value["dev_utts"].split()
    try:
        return Weights(**value)
    except InputError as error:
        raise error.at(path) from error
