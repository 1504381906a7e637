"""All kinds of models that a packed file can hold; the one place that knows them all."""

from __future__ import annotations

from typing import Mapping

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.architecture.listed import ListedArchitecture
from espnet_mpq.architecture.rnn_lm import RnnArchitecture
from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.errors import InputError

FAMILIES = (RnnArchitecture, TransformerArchitecture, ListedArchitecture)


def from_dict(value: Mapping) -> Architecture:
    """From the JSON form; raises InputError for an unknown family, unknown or missing keys."""
    name = value.get("class") if isinstance(value, Mapping) else value
    for family in FAMILIES:
        if name == family.FAMILY:
            return family.from_dict(value)
    raise InputError(
        "architecture: unknown class",
        found=repr(name)[:80],
        expected=" or ".join(repr(family.FAMILY) for family in FAMILIES),
    )
