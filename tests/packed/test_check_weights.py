"""Weights that do not fit a tied architecture are refused, not a KeyError."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from espnet_mpq.errors import MismatchError
from espnet_mpq.packed.pack import check_weights

from packed_models import architecture  # isort: skip


def test_tied_lm_without_its_embedding():
    arch = dataclasses.replace(architecture(vocab_size=10, unit=4), tie_weights=True)
    weights = {name: torch.ones(shape) for name, shape in arch.state_shapes().items()}
    weights["decoder.weight"] = weights.pop("encoder.weight")
    with pytest.raises(MismatchError, match="missing .*encoder.weight"):
        check_weights(weights, arch)
