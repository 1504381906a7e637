"""Options of the super-network's search of bits: the JSON form is ``lm_conf.nas``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Dict, Mapping, Optional, Tuple

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.plan import ClusterSpec

PHASES = ("joint", "weights", "architecture")
RELAXATIONS = ("gumbel", "softmax")
PENALTIES = ("budget", "paper")


@dataclass(frozen=True)
class NasOptions:
    """How the super-network chooses bits; the JSON form is ``lm_conf.nas``.

    Attributes:
        budget: effective bits of the whole packed file (8 x bytes / weights), or None when
            ``budget_bytes`` says it in bytes. The phase "weights" needs neither.
        bits: candidates of every cluster.
        grid, tying, group_size, scale_dtype: of every candidate, as in a plan.
        phase: what is trained. "joint": weights and architecture together (Xu et al. 2021);
            "weights": the weights, on uniformly drawn one-hot paths, then "architecture": the
            logits alone, on held-out text (arXiv 2206.11643).
        relaxation: "gumbel": softmax((a + G) / T), G standard Gumbel noise; "softmax": G = 0.
        temperature, final_temperature: T of the first and of the last epoch, geometric between.
        lr: Adam step of the logits.
        penalty: "budget": the multiplier of the budget finds itself; "paper": the printed
            beta * sum p sqrt(bits), with probabilities for the raw logits, and no budget.
        beta: of "paper".
        rho: curvature of the budget's penalty, nats per squared relative overshoot.
        multiplier_rate: of the dual ascent, per update.
        settle: last share of the epochs, in which the one-best plan itself is brought within the
            budget and kept there.
        refresh_updates: updates between two renewals of the scales while the weights train.

    Raises:
        InputError: a value that makes no sense.
    """

    budget: Optional[float] = None
    budget_bytes: Optional[int] = None
    bits: Tuple[int, ...] = (1, 2, 4, 8)
    grid: str = "uniform"
    tying: str = "row"
    group_size: Optional[int] = None
    scale_dtype: str = "float16"
    phase: str = "architecture"
    relaxation: str = "gumbel"
    temperature: float = 1.0
    final_temperature: float = 0.1
    lr: float = 0.05
    penalty: str = "budget"
    beta: float = 0.5
    rho: float = 1.0
    multiplier_rate: float = 0.1
    settle: float = 0.3
    refresh_updates: int = 50

    def __post_init__(self):
        is_list = isinstance(self.bits, (list, tuple))
        if not is_list or not all(type(bits) is int for bits in self.bits):
            raise InputError("nas.bits", found=repr(self.bits), expected="a list such as [1, 2, 4]")
        object.__setattr__(self, "bits", tuple(self.bits))
        for spec in self.specs().values():
            spec.check("nas.bits")
        if len(set(self.bits)) < 2 or list(self.bits) != sorted(set(self.bits)):
            raise InputError(
                "nas.bits", found=list(self.bits), expected="two or more bit-widths, rising"
            )
        for name, known in (
            ("phase", PHASES),
            ("relaxation", RELAXATIONS),
            ("penalty", PENALTIES),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"nas.{name}", found=repr(getattr(self, name)), expected=" or ".join(known)
                )
        n_budgets = (self.budget is not None) + (self.budget_bytes is not None)
        if n_budgets > 1 or (n_budgets == 0 and self.phase != "weights"):
            raise InputError(
                "nas.budget (effective bits) or nas.budget_bytes",
                found="both" if n_budgets else "none",
                expected="one of them",
            )
        positive = ["temperature", "final_temperature", "lr", "rho", "multiplier_rate"]
        positive += [n for n in ("budget", "budget_bytes") if getattr(self, n) is not None]
        for name in positive:
            self._check_number(name, 0.0, math.inf)
        self._check_number("beta", -1e-300, math.inf)
        self._check_number("settle", -1e-300, 1.0)
        if self.final_temperature > self.temperature:
            raise InputError(
                "nas.final_temperature",
                found=self.final_temperature,
                expected=f"at most nas.temperature, which is {self.temperature}",
            )
        if type(self.refresh_updates) is not int or self.refresh_updates < 1:
            raise InputError(
                "nas.refresh_updates", found=repr(self.refresh_updates), expected="1 or more"
            )

    def _check_number(self, name: str, above: float, most: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not above < value <= most:
            raise InputError(f"nas.{name}", found=repr(value), expected=f"above {max(above, 0):g}")

    @classmethod
    def from_dict(cls, value: Mapping) -> "NasOptions":
        """Read ``lm_conf.nas``; raises InputError for unknown keys, with near matches."""
        if not isinstance(value, Mapping):
            raise InputError("nas", found=repr(value), expected="options such as {budget: 2.0}")
        known = [f.name for f in fields(cls)]
        for key in value:
            if key not in known:
                raise InputError(f"unknown option nas.{key}", todo=near_matches(key, known))
        return cls(**value)

    def to_dict(self) -> dict:
        """The JSON form, without what is at its default."""
        value = {}
        for f in fields(self):
            mine = getattr(self, f.name)
            if mine != f.default:
                value[f.name] = list(mine) if isinstance(mine, tuple) else mine
        return value

    def specs(self) -> Dict[int, ClusterSpec]:
        """Candidate bits -> spec."""
        return {b: ClusterSpec(b, self.grid, self.tying, self.group_size) for b in self.bits}
