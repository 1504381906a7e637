"""The finishing phase: codes frozen, scales tuned by Adam on their logarithms."""

from __future__ import annotations

from typing import Dict, List, Optional

import torch

from espnet_mpq.quant.scale import SCALE_DTYPES, spread
from espnet_mpq.training.on_grid import Mats, OnGrid


class Finishing:
    """W = α exp(gain) V with V fixed; one gain per scale, shared where the scale is shared.

    The rounding of scales to the plan's scale_dtype is part of W (straight-through), so the
    tuned weights lie exactly where the packed file will put them. A zero scale stays zero.

    Args:
        table: α and V at the start of the phase.
        lr: Adam step of the gains; about the relative change of a scale per update.

    Source: own; the idea is that of learned step sizes (LSQ, arXiv 1902.08153) with fixed codes.
    """

    def __init__(self, table: OnGrid, lr: float):
        self.table = table
        self.gains: Dict[str, torch.Tensor] = {}
        for name, scales in table.scales.items():
            for part, scale in enumerate(scales):
                gain = torch.zeros_like(scale, dtype=torch.float32).requires_grad_(True)
                self.gains.setdefault(self._key(name, part), gain)
        # As a group: a plan of 16 and 32 bits alone has no scales, and Adam refuses a bare [].
        self.adam = torch.optim.Adam([{"params": list(self.gains.values())}], lr=lr)

    def _key(self, name: str, part: int) -> str:
        spec = self.table.plan.clusters[name]
        if spec.shared_key:
            return f"model/{spec.bits}-{spec.grid}"
        return name if spec.tying == "cluster" else f"{name}/{part}"

    def _scales(self, name: str) -> List[torch.Tensor]:
        dtype = SCALE_DTYPES[self.table.plan.scale_dtype]
        scales = []
        for part, start in enumerate(self.table.scales[name]):
            exact = start * self.gains[self._key(name, part)].exp()
            rounded = exact.detach().to(dtype).float()
            scales.append(exact + (rounded - exact.detach()))
        return scales

    @torch.no_grad()
    def current(self) -> OnGrid:
        """α exp(gain), rounded, and V."""
        scales = {name: [s.detach() for s in self._scales(name)] for name in self.table.scales}
        return OnGrid(self.table.plan, scales, self.table.codes)

    def step(self, gradients: Mats, slopes: Optional[Mats] = None) -> None:
        """One Adam step on the gains from dL/dW, given per cluster and part as (rows, cols).

        ``slopes``: dW/dα in the same form; None: the levels, as codes that stay make it.
        """
        outputs, upstream = [], []
        with torch.enable_grad():
            for name, mats in gradients.items():
                if slopes is None:
                    outputs += self.table.values(name, self._scales(name))
                else:
                    size = self.table.plan.clusters[name].group_size
                    pairs = zip(self._scales(name), slopes[name])
                    outputs += [spread(scale, s.shape[1], size) * s for scale, s in pairs]
                upstream += [gradient.float() for gradient in mats]
            if not outputs:
                return
            gains = list(self.gains.values())
            found = torch.autograd.grad(outputs, gains, upstream, allow_unused=True)
        for gain, gradient in zip(gains, found):
            gain.grad = gradient
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        gains = {key: gain.detach().clone() for key, gain in self.gains.items()}
        return {"start": self.table.to_dict(), "gains": gains, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """``state["start"]`` belongs into the OnGrid this object is made from."""
        with torch.no_grad():
            for key, gain in self.gains.items():
                gain.copy_(state["gains"][key])
        self.adam.load_state_dict(state["adam"])
