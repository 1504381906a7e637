"""Grids: levels spelled out, nearest level against comparison with all levels, ties."""

import pytest
import torch

from espnet_mpq.errors import InputError
from espnet_mpq.quant.grid import GRIDS, Grid, make_grid

NAMES = ("paper", "uniform")
SKEWED = Grid("codebook", 4, (-90, -31, -30, -7, -1, 0, 2, 9, 10, 50, 127))


def _name(value):
    return f"{value.name}-{value.bits}" if isinstance(value, Grid) else None


def test_paper_levels():
    assert make_grid("paper", 1).levels == (-1, 1)  # the printed formula would leave (0,)
    assert make_grid("paper", 2).levels == (-1, 0, 1)
    assert make_grid("paper", 4).levels == tuple(range(-7, 8))
    assert make_grid("paper", 8).levels == tuple(range(-127, 128))


def test_uniform_levels():
    assert make_grid("uniform", 1).levels == (-1, 1)
    assert make_grid("uniform", 2).levels == (-3, -1, 1, 3)
    assert make_grid("uniform", 4).levels == (-15, -13, -11, -9, -7, -5, -3, -1) + (
        1, 3, 5, 7, 9, 11, 13, 15,
    )
    assert make_grid("uniform", 8).levels == tuple(range(-128, 128))


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_levels_are_int8_and_every_code_fits(bits):
    for name in ("paper", "uniform"):
        grid = make_grid(name, bits)
        back = grid.levels_tensor(dtype=torch.int8)
        assert back.tolist() == list(grid.levels) and len(grid.levels) <= 2**bits
    assert len(make_grid("uniform", bits).levels) == 2**bits


def test_symmetry_and_step():
    assert make_grid("paper", 4).is_symmetric and make_grid("paper", 4).step == 1
    assert make_grid("uniform", 4).is_symmetric and make_grid("uniform", 4).step == 2
    assert not make_grid("uniform", 8).is_symmetric and make_grid("uniform", 8).max_level == 128
    assert SKEWED.step is None and not SKEWED.is_symmetric


@pytest.mark.parametrize(
    "grid", [make_grid(n, b) for n in NAMES for b in range(1, 9)] + [SKEWED], ids=_name
)
def test_codes_are_those_of_the_nearest_level(grid):
    torch.manual_seed(0)
    ratio = (torch.rand(2000, dtype=torch.float64) - 0.5) * 3 * grid.max_level
    levels = grid.levels_tensor(dtype=torch.float64)
    expected = (ratio[:, None] - levels).abs().argmin(1)
    codes = grid.codes_of(ratio.float())
    assert codes.long().tolist() == expected.tolist()
    assert grid.levels_of(codes).tolist() == levels[expected].tolist()


@pytest.mark.parametrize(
    "grid", [make_grid(n, b) for n in NAMES for b in (1, 2, 4, 8)] + [SKEWED], ids=_name
)
def test_ties_take_the_upper_level(grid):
    pairs = list(zip(grid.levels, grid.levels[1:]))
    middles = torch.tensor([(low + up) / 2 for low, up in pairs])
    assert grid.codes_of(middles.clone()).tolist() == list(range(1, len(grid.levels)))
    below = torch.nextafter(middles, torch.tensor(-1e9))
    below[middles == 0] = -1e-37
    if grid.step != 1:  # x + 0.5 cannot tell the float just below a middle from the middle
        assert grid.codes_of(below).tolist() == list(range(len(pairs)))


def test_smallest_negative_weight_is_negative_at_one_bit():
    ratio = torch.tensor([-1e-38, 0.0, 1e-38])
    assert make_grid("uniform", 1).codes_of(ratio).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("codebook", 4, (1,)),
        ("codebook", 4, (3, 1)),
        ("codebook", 4, (1, 1)),
        ("codebook", 1, (-1, 0, 1)),
        ("codebook", 8, tuple(range(17))),
        ("codebook", 4, (0, 128)),
        ("codebook", 4, (-129, 0)),
        ("paper", 0, (-1, 1)),
        ("paper", 9, (-1, 1)),
    ],
)
def test_bad_grids(arguments):
    with pytest.raises(InputError):
        Grid(*arguments)


def test_make_grid_refuses():
    with pytest.raises(InputError, match="did you mean 'uniform'"):
        make_grid("unifrom", 2)
    with pytest.raises(InputError, match="levels of its own"):
        make_grid("codebook", 2)
    with pytest.raises(InputError, match="1 to 8"):
        make_grid("paper", 9)
    assert GRIDS == ("paper", "uniform", "codebook")
