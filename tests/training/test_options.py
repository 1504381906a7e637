"""AdmmOptions: the defaults hold, nonsense is refused with the option's name."""

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.training.options import AdmmOptions


@pytest.mark.parametrize(
    "name, value",
    [
        ("gamma", 0.0),
        ("gamma", -1e-3),
        ("gamma", float("nan")),
        ("gamma_schedule", "sometimes"),
        ("gamma_growth", 0.5),
        ("gamma_max", 1e-9),
        ("dual_period", -1),
        ("dual_period", 2.5),
        ("projection", "nearest"),
        ("als_rounds", 0),
        ("eta1", 0.0),
        ("saved", "float"),
        ("finish_epochs", -1),
        ("finish_lr", float("inf")),
    ],
)
def test_nonsense_is_refused(name, value):
    with pytest.raises(InputError, match=name):
        AdmmOptions(**{name: value})


def test_a_constant_gamma_may_lie_above_the_ceiling_of_a_growing_one():
    AdmmOptions(gamma=2.0, gamma_schedule="constant")
    with pytest.raises(InputError, match="gamma_max.*at least 2.0"):
        AdmmOptions(gamma=2.0, gamma_schedule="growing")


def test_defaults_and_bounds_are_accepted():
    assert AdmmOptions().gamma_max >= AdmmOptions().gamma > 0
    bounds = dict(
        gamma=0.5, gamma_max=0.5, gamma_growth=1, dual_period=1, finish_epochs=0
    )
    made = AdmmOptions(**bounds)
    assert {name: getattr(made, name) for name in bounds} == bounds
