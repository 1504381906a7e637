"""Projection: brute force on tiny vectors, invariances, traps, masks."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from espnet_mpq.errors import InputError
from espnet_mpq.quant import sweep
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.grid import Grid, make_grid
from espnet_mpq.quant.projection import project

F32 = torch.float32
ALL = [make_grid(name, bits) for name in ("paper", "uniform") for bits in (1, 2, 3, 4, 8)]
SMALL = [grid for grid in ALL if grid.bits <= 4]
SKEWED = [
    Grid("codebook", 2, (-3, 0, 1, 7)),
    Grid("codebook", 2, (-5, 4)),
    Grid("codebook", 2, (1, 4, 9)),
    Grid("codebook", 3, (-9, -8, -2, 1, 5)),
]
floats = st.floats(-4, 4, width=32)
relaxed = settings(deadline=None, max_examples=60)
rows = st.lists(floats, min_size=1, max_size=24)


def _name(value):
    return f"{value.name}-{value.bits}" if isinstance(value, Grid) else None


def _error(w, found):
    return float((w.double() - found.values.double()).square().sum())


def _least_error(w, grid):
    """Over all codes, each with its own best positive scale, in float64."""
    w = w.double()
    q = torch.tensor(list(itertools.product(grid.levels, repeat=len(w)))).double()
    a, b = (q @ w).clamp(min=0), q.square().sum(1)
    return float(w.square().sum() - (a * a / b.clamp(min=1e-9)).max())


@pytest.mark.parametrize("grid", SMALL + SKEWED, ids=_name)
@pytest.mark.parametrize("source", ("gauss", "heavy", "whole", "equal"))
def test_mse_is_the_optimum_of_all_codes(grid, source):
    torch.manual_seed(3)
    n_weights, n_trials = {1: (8, 20), 2: (6, 20), 3: (5, 10), 4: (4, 3)}[grid.bits]
    for _ in range(n_trials):
        w = torch.randn(n_weights)
        if source == "heavy":
            w = w**5
        elif source == "whole":
            w = (3 * w).round()
        elif source == "equal":
            w = w.sign() * 0.3
        found = project(w[None], grid, scale_dtype=F32)
        least = _least_error(w, grid)
        norm = float(w.square().sum())
        assert _error(w[None], found) == pytest.approx(least, rel=1e-5, abs=1e-11 + 1e-12 * norm)


@pytest.mark.parametrize("grid", SMALL + SKEWED, ids=_name)
def test_wide_rows_have_the_same_optimum(grid, monkeypatch):
    torch.manual_seed(5)
    w = torch.randn(3, 4000) * torch.tensor([[1.0], [1e-3], [50.0]])
    w[2] = w[2] ** 3
    mask = torch.rand(3, 4000) > 0.3
    expected = sweep.best_scale(w, grid, mask)
    monkeypatch.setattr(sweep, "MAX_ROW_EVENTS", 100)
    monkeypatch.setattr(sweep, "N_BINS", 64)
    monkeypatch.setattr(sweep, "PIECE", 999)
    found = sweep.best_scale(w, grid, mask)
    assert found.shape == (3, 1)
    assert torch.allclose(found, expected, rtol=1e-9)


def _assert_on_grid_at_nearest(w, grid, found, mask=None):
    """Codes, values and scale agree, and no other level is nearer at this scale."""
    levels = grid.levels_tensor(dtype=F32)
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < len(grid.levels)
    assert torch.equal(found.values, found.scale * levels[found.codes.long()])
    distance = (w[:, :, None].double() - found.scale.double()[:, :, None] * levels.double()).abs()
    nearest = (w.double() - found.values.double()).abs()
    slack = 1e-6 * (w.abs().double() + found.scale.double())
    used = torch.ones_like(w, dtype=torch.bool) if mask is None else mask
    assert (nearest <= distance.amin(2) + slack)[used].all()


@relaxed
@given(rows, st.sampled_from(ALL), st.sampled_from(("mse", "als")), st.booleans())
def test_result_is_consistent(values, grid, method, half):
    w = torch.tensor([values])
    dtype = torch.float16 if half else F32
    found = project(w, grid, method=method, scale_dtype=dtype)
    assert torch.equal(found.scale, found.scale.to(dtype).float())
    assert (found.scale >= 0).all()
    _assert_on_grid_at_nearest(w, grid, found)
    assert torch.isfinite(found.values).all()


@relaxed
@given(rows, st.sampled_from(ALL + SKEWED), st.booleans())
def test_projecting_twice_changes_nothing(values, grid, half):
    w = torch.tensor([values])
    dtype = torch.float16 if half else F32
    once = project(w, grid, scale_dtype=dtype)
    again = project(once.values, grid, scale_dtype=dtype)
    if half:
        assert torch.equal(again.values, once.values)
    else:
        assert torch.allclose(again.values, once.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", ALL, ids=_name)
@pytest.mark.parametrize("width", (3, 64, 650, 300_000))
def test_weights_on_the_grid_come_back_bit_for_bit(grid, width):
    torch.manual_seed(7)
    levels = grid.levels_tensor(dtype=F32)
    codes = torch.randint(0, len(levels), (5 if width < 1000 else 1, width))
    if grid.bits == 8:
        codes[0] = 128 - codes[0].remainder(90)  # largest level far from the ends
    scale = (torch.rand(len(codes), 1) * 0.02 + 0.001).half().float()
    w = scale * levels[codes]
    found = project(w, grid)
    assert torch.equal(found.values, w)


@relaxed
@given(rows, st.sampled_from(ALL), st.integers(-12, 12), st.sampled_from(("mse", "als")))
def test_powers_of_two_scale_through(values, grid, exponent, method):
    w = torch.tensor([values])
    assume(float(w.abs().max()) > 1e-3)
    w[w.abs() < 1e-30] = 0  # would leave the range of float32 below
    plain = project(w, grid, method=method, scale_dtype=F32)
    scaled = project(w * 2.0**exponent, grid, method=method, scale_dtype=F32)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scale, plain.scale * 2.0**exponent)


@relaxed
@given(rows, st.sampled_from(SMALL), st.randoms(use_true_random=False))
def test_order_and_neighbours_do_not_matter(values, grid, random):
    order = list(range(len(values)))
    random.shuffle(order)
    w = torch.tensor([values])
    plain = project(w, grid, scale_dtype=F32)
    mixed = project(torch.cat([w * 3, w[:, order], w.flip(1)]), grid, scale_dtype=F32)
    shuffled = _error(w[:, order], type(plain)(None, None, mixed.values[1:2]))
    assert shuffled == pytest.approx(_error(w, plain), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("grid", SMALL, ids=_name)
def test_negated_weights_negate_values(grid):
    torch.manual_seed(2)
    w = torch.randn(20, 33)
    found, mirrored = project(w, grid), project(-w, grid)
    assert torch.equal(mirrored.values, -found.values)


@pytest.mark.parametrize("method", ("mse", "als"))
@pytest.mark.parametrize("grid", ALL + SKEWED, ids=_name)
def test_rows_of_zeros(grid, method):
    w = torch.zeros(3, 5)
    w[1] = torch.tensor([0.1, -0.2, 0.3, 0.05, 0.4])
    start = torch.tensor([[0.0], [0.1], [2.0]])
    for init in (None, start):
        found = project(w, grid, method=method, init_scale=init)
        if grid in ALL:
            assert found.scale[0] == 0 and (found.values[0] == 0).all()
        assert (found.values[0] == 0).all() or found.scale[0] == 0
        assert torch.isfinite(found.values).all() and found.scale[1] > 0
    assert found.codes.shape == (3, 5)


@pytest.mark.parametrize("method", ("mse", "als"))
@pytest.mark.parametrize("grid", ALL, ids=_name)
def test_rows_of_one_weight(grid, method):
    w = torch.tensor([[0.3], [-0.02], [0.0], [5.0]])
    found = project(w, grid, method=method, scale_dtype=F32)
    # At 8 bits "als" searches the scale of a spread-out row; the step then bounds the error.
    assert torch.allclose(found.values, w, rtol=1e-6 if grid.bits < 8 or method == "mse" else 0.02)


@pytest.mark.parametrize("method", ("mse", "als"))
@pytest.mark.parametrize("grid", ALL, ids=_name)
def test_denormal_and_huge_weights(grid, method):
    w = torch.tensor([[1.0, -0.5, 0.25, 0.8]])
    plain = project(w, grid, method=method, scale_dtype=F32)
    for factor in (2.0**-100, 2.0**-125, 2.0**100, 2.0**120):
        found = project(w * factor, grid, method=method, scale_dtype=F32)
        assert torch.isfinite(found.values).all()
        assert torch.allclose(found.values / factor, plain.values, rtol=1e-5)
    tiny = project(torch.full((1, 4), 1e-44), grid, method=method, scale_dtype=F32)
    assert torch.isfinite(tiny.values).all()
    nothing = project(w * 1e-12, grid, method=method)  # below the smallest float16
    assert (nothing.scale == 0).all() and (nothing.values == 0).all()


@pytest.mark.parametrize("method", ("mse", "als"))
def test_scale_beyond_float16(method):
    w = torch.tensor([[1e7, -1e6]])
    with pytest.raises(InputError, match="too large for torch.float16"):
        project(w, make_grid("uniform", 2), method=method)
    assert relative_error(w, project(w, make_grid("uniform", 2), scale_dtype=F32).values) < 0.1


@pytest.mark.parametrize("grid", ALL + SKEWED, ids=_name)
@pytest.mark.parametrize("method", ("mse", "als"))
def test_masked_weights_do_not_count(grid, method):
    torch.manual_seed(0)
    w = torch.randn(7, 12)
    n_used = 9
    mask = torch.zeros(7, 12, dtype=torch.bool)
    mask[:, :n_used] = True
    for padding in (0.0, 1e3):
        w[:, n_used:] = padding
        found = project(w, grid, mask=mask, method=method)
        expected = project(w[:, :n_used].contiguous(), grid, method=method)
        assert torch.allclose(found.scale, expected.scale, rtol=1e-3)
        assert torch.allclose(found.values[:, :n_used], expected.values, rtol=1e-3)


@relaxed
@given(rows, st.sampled_from(ALL), st.floats(0.001, 8))
def test_no_round_of_als_increases_the_error(values, grid, start):
    w = torch.tensor([values])
    # Start from the nearest float16, as a stored scale is.
    scale = torch.tensor([[start]]).half().float()
    levels = grid.levels_tensor(dtype=F32)
    q = (w[:, :, None] - scale[:, :, None] * levels).abs().argmin(2)
    before = float((w.double() - (scale * levels[q]).double()).square().sum())
    norm = float(w.square().sum())
    for _ in range(6):
        found = project(w, grid, method="als", init_scale=scale, rounds=1)
        after = _error(w, found)
        assert after <= before + 1e-6 * norm
        before, scale = after, found.scale


@relaxed
@given(rows, st.sampled_from(ALL))
def test_als_is_never_better_than_mse_on_small_grids(values, grid):
    assume(grid.bits <= 4)
    w = torch.tensor([values])
    best = _error(w, project(w, grid, scale_dtype=F32))
    als = _error(w, project(w, grid, method="als", scale_dtype=F32))
    assert best <= als + 1e-6 * float(w.square().sum())


@pytest.mark.parametrize("grid", ALL + SKEWED[:1], ids=_name)
@pytest.mark.parametrize("start", (1.0, 0.0, -1.0, float("nan"), float("inf"), 1e30))
def test_bad_starts_of_als(grid, start):
    """Weights far below a scale of 1 all round to 0 there: the next scale would be 0 / 0."""
    torch.manual_seed(4)
    w = torch.randn(3, 200) * 0.01
    init = torch.full((3, 1), start)
    init[1] = 0.02 / grid.max_level
    found = project(w, grid, method="als", init_scale=init)
    assert torch.isfinite(found.values).all() and (found.scale > 0).all()
    assert relative_error(w, found.values) < {1: 0.4, 2: 0.55, 3: 0.5, 4: 0.1, 8: 1e-3}[grid.bits]


def test_rounds_are_counted():
    torch.manual_seed(6)
    w = torch.randn(1, 4000)
    grid = make_grid("paper", 4)
    start = torch.tensor([[0.2]])
    errors = [
        _error(w, project(w, grid, method="als", init_scale=start, rounds=n, scale_dtype=F32))
        for n in (0, 1, 2, 4, 60)
    ]
    assert all(a > b for a, b in zip(errors, errors[1:]))
    kept = project(w, grid, method="als", init_scale=start, rounds=0, scale_dtype=F32)
    assert torch.equal(kept.scale, start)


def test_a_known_answer():
    # Ternary: the best set is {3, -2}, scale 2.5, error 0.25 + 0.25 + 0.01 (by hand).
    found = project(torch.tensor([[3.0, -2.0, 0.1]]), make_grid("paper", 2))
    assert found.scale.tolist() == [[2.5]]
    assert found.codes.tolist() == [[2, 0, 1]]
    assert found.values.tolist() == [[2.5, -2.5, 0.0]]
    # Without a level 0, 0.1 must take the inner level: (9 + 2 + .1) / 11 is the best scale.
    found = project(torch.tensor([[3.0, -2.0, 0.1]]), make_grid("uniform", 2), scale_dtype=F32)
    levels = torch.tensor([-3.0, -1.0, 1.0, 3.0])[found.codes.long()]
    assert levels.tolist() == [[3.0, -3.0, 1.0]]
    assert float(found.scale) == pytest.approx((9 + 6 + 0.1) / 19)


def test_zero_takes_the_upper_level_at_one_bit():
    found = project(torch.tensor([[0.0, -0.3, 0.3, 0.0]]), make_grid("paper", 1), scale_dtype=F32)
    assert found.codes.tolist() == [[1, 0, 1, 1]]
    assert float(found.scale) == pytest.approx(0.15)


def test_chunks_do_not_show(monkeypatch):
    from espnet_mpq.quant import projection

    torch.manual_seed(0)
    w = torch.randn(9, 41)
    for grid in ALL:
        for method in ("mse", "als"):
            whole = project(w, grid, method=method, scale_dtype=F32)
            for tile in (30, 100):  # 30: narrower than a row, so columns are cut too
                monkeypatch.setattr(projection, "TILE", tile)
                cut = project(w, grid, method=method, scale_dtype=F32)
                monkeypatch.undo()
                assert torch.allclose(cut.scale, whole.scale, rtol=1e-5)
                assert relative_error(whole.values, cut.values) < 1e-3


def test_input_is_left_alone_and_other_dtypes_are_read():
    torch.manual_seed(0)
    w = torch.randn(4, 30)
    before = w.clone()
    for grid in ALL + SKEWED:
        for method in ("mse", "als"):
            project(w, grid, method=method)
            assert torch.equal(w, before)
    grid = make_grid("uniform", 4)
    assert torch.equal(project(w.half().double(), grid).values, project(w.half(), grid).values)
    strided = torch.randn(30, 4).t()
    assert torch.equal(project(strided, grid).values, project(strided.contiguous(), grid).values)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("method", ("mse", "als"))
def test_nan_and_infinity_are_refused(bad, method):
    w = torch.ones(3, 4)
    w[1, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        project(w, make_grid("uniform", 2), method=method)


def test_wrong_arguments():
    w, grid = torch.ones(2, 3), make_grid("uniform", 2)
    for kwargs in (
        {"method": "best"},
        {"init_scale": torch.ones(2)},
        {"mask": torch.ones(2, 3)},
        {"mask": torch.ones(2, 2, dtype=torch.bool)},
        {"scale_dtype": torch.bfloat16},
    ):
        with pytest.raises(InputError):
            project(w, grid, **kwargs)
    for values in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.int32)):
        with pytest.raises(InputError, match="n_scales, width"):
            project(values, grid)


def test_relative_error():
    w = torch.tensor([[3.0, 4.0]])
    assert relative_error(w, torch.tensor([[3.0, 3.0]])) == pytest.approx(1 / 25)
    assert relative_error(w * 0, w * 0) == 0 and relative_error(w * 0, w) == math.inf
