"""The part of a host's model that has a plan, or searches one."""

from __future__ import annotations

from typing import Tuple

import torch


def planned_part(model: torch.nn.Module) -> Tuple[str, torch.nn.Module]:
    """(prefix of its names in checkpoints, module); ("", None) for a stock model.

    The host wraps an LM: the part is a child. Of other models it is the model itself.
    """
    for prefix, module in (("", model), *((f"{n}.", m) for n, m in model.named_children())):
        if getattr(module, "plan", None) is not None or getattr(module, "nas", None) is not None:
            return prefix, module
    return "", None
