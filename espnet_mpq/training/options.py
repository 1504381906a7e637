"""Options of ADMM and of quantization-aware training, host-free, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Dict, Tuple

from espnet_mpq.errors import InputError

TRAINERS = ("admm", "qat")  # the first is the default
GAMMA_SCHEDULES = ("constant", "growing")
PROJECTIONS = ("mse", "als")
SAVED = ("auto", "weights", "table")
Bounds = Dict[str, Tuple]  # option -> (least, whether it is allowed[, most])
TABLE_PRIMAL = 0.15  # measured: both as good at 0.155, the table better below, worse above


def _option(default, text: str, choices=None, shown: bool = False):
    return field(default=default, metadata={"help": text, "choices": choices, "shown": shown})


@dataclass(frozen=True)
class AdmmOptions:
    """How the three ADMM steps and the finishing phase run.

    The defaults were measured (tests/bench/bench_admm.py): 2 bits, 5 to 10 epochs of Adam at
    1e-3 from a trained LM. The published setting is gamma 1e-3, schedule "constant", period 0,
    20 rounds, extragradient, no finishing phase.

    The metadata of a field says what it does (``help``, also that of the host's option
    --mpq_NAME), what it may be (``choices``), and whether ready training files show it (``shown``).

    Raises:
        InputError: a value that makes no sense.
    """

    gamma: float = _option(
        1e-4,
        "penalty of the augmented Lagrangian, relative to a per-token mean loss in nats (published:"
        " 1e-3)",
        shown=True,
    )
    gamma_schedule: str = _option(
        "growing",
        "constant (as published) or growing: times gamma_growth after every epoch, never above"
        " gamma_max; the scaled dual is divided by the same factor",
        choices=GAMMA_SCHEDULES,
        shown=True,
    )
    gamma_growth: float = _option(4.0, "factor of gamma in one epoch, at least 1", shown=True)
    gamma_max: float = _option(1.0, "ceiling of a growing gamma", shown=True)
    dual_period: int = _option(
        50,
        "optimizer updates between two dual updates, 0 = once per epoch; the weights must have time"
        " to follow: about (grid step) / (learning rate) updates",
        shown=True,
    )
    projection: str = _option(
        "als",
        "step 2: als (alternating least squares from the last scales, as published) or mse (optimal"
        " scale search); the first projection is always mse",
        choices=PROJECTIONS,
    )
    als_rounds: int = _option(5, "inner rounds of als (the papers use at most 20)")
    extragradient: bool = _option(
        False,
        "take the weight gradient at a probe point (as published; twice the time)",
        shown=True,
    )
    eta1: float = _option(0.02, "step of the extragradient probe")
    saved: str = _option(
        "auto",
        "what validation sees and checkpoints hold: weights (nearest grid point of the float"
        " weights), table (of weights + dual), auto (the table once the primal residual is below"
        f" {TABLE_PRIMAL}: before that it is far from anything that was trained)",
        choices=SAVED,
    )
    finish_epochs: int = _option(
        1,
        "last epochs of the run, which keep the codes and tune scales and float rest (early"
        " stopping may end a run before them)",
        shown=True,
    )
    finish_lr: float = _option(1e-3, "Adam step of the log scales in these epochs")

    def __post_init__(self):
        for option in fields(self):
            known, value = option.metadata["choices"], getattr(self, option.name)
            if known and value not in known:
                raise InputError(
                    f"ADMM option {option.name}",
                    found=repr(value),
                    expected="one of " + ", ".join(known),
                )
        bounds: Bounds = {
            "gamma": (0.0, False),
            "gamma_growth": (1.0, True),
            "dual_period": (0, True),
            "als_rounds": (1, True),
            "eta1": (0.0, False),
            "finish_epochs": (0, True),
            "finish_lr": (0.0, False),
        }
        if self.gamma_schedule == "growing":  # a constant gamma has no ceiling
            bounds["gamma_max"] = (self.gamma, True)
        _check("ADMM", self, bounds)


@dataclass(frozen=True)
class QatOptions:
    """How quantization-aware training runs; metadata as that of AdmmOptions.

    Raises:
        InputError: a value that makes no sense.
    """

    decay: bool = _option(
        True,
        "let the learning rate fall linearly to 0 at the last update, on top of a scheduler",
        shown=True,
    )
    warmup: int = _option(10, "updates in which the learning rate rises, with mpq_decay")
    freeze: float = _option(
        0.1,
        "last part of the run, 0..1, in which the codes stay and scales, biases and norms are"
        " tuned",
        shown=True,
    )
    scale_lr: float = _option(1.0, "step of the log scales, relative to the learning rate")
    blend: float = _option(
        0.0,
        "first part of the run, 0..1, in which the forward pass goes from the float weights to the"
        " quantized ones; 0: quantized from the start",
    )
    pull_period: int = _option(
        0, "updates between two proximal pulls W <- (1 - pull) W + pull Q(W); 0: never"
    )
    pull: float = _option(0.4, "of one pull, 0..1")

    def __post_init__(self):
        if not isinstance(self.decay, bool):
            raise InputError("QAT option decay", found=repr(self.decay), expected="true or false")
        unit = (0.0, True, 1.0)
        bounds: Bounds = dict(freeze=unit, blend=unit, pull=unit)
        bounds.update(warmup=(0, True), pull_period=(0, True), scale_lr=(0.0, True))
        _check("QAT", self, bounds)


def _check(title: str, options, bounds: Bounds) -> None:
    """Raise InputError unless all options are numbers within (low, low is allowed, high)."""
    whole = {f.name for f in fields(options) if f.type == "int"}
    for name, (low, inclusive, *high) in bounds.items():
        value = getattr(options, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        number = number and math.isfinite(value)
        if number and name in whole:
            number = value == int(value)
        is_low = number and (value < low or (value == low and not inclusive))
        if not number or is_low or (high and value > high[0]):
            kind = "a whole number" if name in whole else "a number"
            expected = f"{kind} {'of at least' if inclusive else 'above'} {low}"
            if high:
                expected += f", at most {high[0]}"
            raise InputError(f"{title} option {name}", found=repr(value), expected=expected)
