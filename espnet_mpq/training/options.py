"""Options of ADMM training, host-free, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from espnet_mpq.errors import InputError

GAMMA_SCHEDULES = ("constant", "growing")
PROJECTIONS = ("mse", "als")
SAVED = ("auto", "weights", "table")
TABLE_PRIMAL = 0.15  # measured: both as good at 0.155, the table better below, worse above


@dataclass(frozen=True)
class AdmmOptions:
    """How the three ADMM steps and the finishing phase run.

    The defaults were measured (tests/bench/bench_admm.py): 2 bits, 5 to 10 epochs of Adam at
    1e-3 from a trained LM. The published setting is gamma 1e-3, schedule "constant", period 0,
    20 rounds, extragradient, no finishing phase.

    Attributes:
        gamma: penalty of the augmented Lagrangian, relative to a per-token mean loss in nats
            (the papers use 1e-3 throughout).
        gamma_schedule: "constant" (as published) or "growing" (times gamma_growth after every
            epoch, never above gamma_max; the scaled dual is divided by the same factor).
        gamma_growth: factor of one epoch, at least 1.
        gamma_max: ceiling of a growing gamma.
        dual_period_updates: optimizer updates between two dual updates; 0 = once per epoch. The
            weights must have time to follow: about (grid step) / (learning rate) updates.
        projection: step 2's method: "als" (alternating least squares from the last scales, as
            published) or "mse" (optimal scale search). The first projection is always "mse".
        als_rounds: inner rounds of "als" (the papers use at most 20).
        extragradient: take the weight gradient at a probe point (as published; doubles the cost).
        eta1: step of the probe.
        saved: what validation sees and checkpoints hold: "weights" = nearest grid point of the
            float weights, "table" = step 2's table, the nearest grid point of weights + dual;
            "auto" = the table once the primal residual is below TABLE_PRIMAL (before that the
            table is far from anything that was trained), else the weights.
        finish_epochs: last epochs of the run, which keep the codes and tune scales and float rest
            (early stopping may end a run before them).
        finish_lr: Adam step of the log scales in these epochs.

    Raises:
        InputError: a value that makes no sense.
    """

    gamma: float = 1e-4
    gamma_schedule: str = "growing"
    gamma_growth: float = 4.0
    gamma_max: float = 1.0
    dual_period_updates: int = 50
    projection: str = "als"
    als_rounds: int = 5
    extragradient: bool = False
    eta1: float = 0.02
    saved: str = "auto"
    finish_epochs: int = 1
    finish_lr: float = 1e-3

    def __post_init__(self):
        for name, known in (
            ("gamma_schedule", GAMMA_SCHEDULES),
            ("projection", PROJECTIONS),
            ("saved", SAVED),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"ADMM option {name}",
                    found=repr(getattr(self, name)),
                    expected="one of " + ", ".join(known),
                )
        bounds = {
            "gamma": (0.0, False),
            "gamma_growth": (1.0, True),
            "dual_period_updates": (0, True),
            "als_rounds": (1, True),
            "eta1": (0.0, False),
            "finish_epochs": (0, True),
            "finish_lr": (0.0, False),
        }
        if self.gamma_schedule == "growing":  # a constant gamma has no ceiling
            bounds["gamma_max"] = (self.gamma, True)
        whole = {f.name for f in fields(self) if f.type == "int"}
        for name, (low, inclusive) in bounds.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            number = number and math.isfinite(value)
            if number and name in whole:
                number = value == int(value)
            if not number or value < low or (value == low and not inclusive):
                kind = "a whole number" if name in whole else "a number"
                raise InputError(
                    f"ADMM option {name}",
                    found=repr(value),
                    expected=f"{kind} {'of at least' if inclusive else 'above'} {low}",
                )
