"""How far quantized weights are from the float ones."""

from __future__ import annotations

from typing import Sequence

import torch


def relative_error(mats: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> float:
    """sum (w - v)^2 / sum w^2 over all matrices, summed in float64.

    For all-zero weights 0 if they are reproduced, else infinity.
    """
    pairs = list(zip(mats, values))
    error = sum(float((w.double() - v.double()).square().sum()) for w, v in pairs)
    norm = sum(float(w.double().square().sum()) for w, _ in pairs)
    if norm > 0:
        return error / norm
    return 0.0 if error == 0 else float("inf")
