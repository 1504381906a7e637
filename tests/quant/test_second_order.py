"""Second-order rounding against a slow reference, plain rounding, exhaustive search and pack."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from espnet_mpq.errors import InputError
from espnet_mpq.quant import second_order
from espnet_mpq.quant.covariance import Covariance
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.quant.grid import Grid, make_grid
from espnet_mpq.quant.second_order import Joined, mean_shift, round_cluster
from espnet_mpq.quant.spec import ClusterSpec

SETTINGS = settings(max_examples=40, deadline=None)


def spec_of(bits=2, grid="uniform", tying="row", group_size=None):
    return ClusterSpec(bits, grid, tying, group_size)


def correlated(n_cols, seed, n=None):
    """Inputs whose columns depend on each other and differ in size, (n, C)."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_cols, n_cols, generator=g) * torch.logspace(-1, 0.5, n_cols)
    return torch.randn(n or 4 * n_cols, n_cols, generator=g) @ mix / n_cols**0.5


def covariance_of(x):
    return Covariance(x.T.double() @ x.double() / len(x))


def weights(rows, cols, seed):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / 8


def output_error(mats, values, covariance):
    difference = torch.cat([w - q for w, q in zip(mats, values)], 1).double()
    return ((difference @ covariance.matrix) * difference).sum(1)


def reference_codes(w, scale, covariance, grid):
    """GPTQ by its definition: an inverse per column, all later columns moved at once.

    (R, C) weights and (R, C) scales in float64; the codes of every row.
    """
    order = covariance.order.tolist()
    w, codes = w.double().clone(), torch.zeros(w.shape, dtype=torch.uint8)
    for k, column in enumerate(order):
        left = order[k:]
        inverse = torch.linalg.inv(covariance.damped[left][:, left])
        code = grid.codes_of(w[:, column] / scale[:, column])
        codes[:, column] = code.to(torch.uint8)
        error = w[:, column] - grid.levels_of(code) * scale[:, column]
        w[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("bits, grid", [(1, "uniform"), (2, "uniform"), (2, "paper"), (4, "paper")])
def test_blocks_give_the_codes_of_the_reference(bits, grid, monkeypatch):
    monkeypatch.setattr(second_order, "BLOCK", 7)
    w, covariance = weights(9, 33, 1).double(), covariance_of(correlated(33, 2))
    start = project_cluster([w], spec_of(bits, grid))
    problem = second_order._Problem(
        [w], spec_of(bits, grid), Joined((0,), covariance), False, torch.float16
    )
    problem.start(start.scales, start.codes)
    problem.make_codes(sweeps=0)
    expected = reference_codes(
        w, start.scales[0].expand(9, 33).double(), covariance, make_grid(grid, bits)
    )
    assert torch.equal(problem.codes, expected)


def test_a_sweep_is_the_best_value_of_each_column_with_the_others_fixed(monkeypatch):
    monkeypatch.setattr(second_order, "BLOCK", 4)
    w, covariance = weights(5, 11, 3).double(), covariance_of(correlated(11, 4))
    grid, scale = make_grid("uniform", 2), torch.full((5, 11), 0.05, dtype=torch.float64)
    q = second_order._nearest(w.clone(), scale, scale, grid)
    expected, h = q.clone(), covariance.damped
    for j in range(11):
        errors = []
        for level in grid.levels:
            trial = expected.clone()
            trial[:, j] = level * 0.05
            errors.append((((w - trial) @ h) * (w - trial)).sum(1))
        best = torch.stack(errors).argmin(0)
        expected[:, j] = torch.tensor(grid.levels, dtype=torch.float64)[best] * 0.05
    found = q.T.contiguous()
    assert second_order._sweep(w.T.contiguous(), scale.T.contiguous(), found, h, grid)
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-12)


def test_scales_are_least_squares_under_the_covariance():
    """With codes fixed, the scales of W | U solve the normal equations of every row."""
    mats, covariance = [weights(6, 10, 5), weights(6, 14, 6)], covariance_of(correlated(24, 7))
    spec = spec_of(2)
    problem = second_order._Problem(mats, spec, Joined((0, 1), covariance), False, torch.float32)
    start = project_cluster(mats, spec)
    problem.start(start.scales, start.codes)
    for _ in range(60):
        second_order._refit([problem], False)
    levels = make_grid("uniform", 2).levels_tensor(dtype=torch.float64)
    for row in range(6):
        level = levels[problem.codes[row].long()]
        parts = torch.zeros(2, 24, dtype=torch.float64)
        parts[0, :10], parts[1, 10:] = level[:10], level[10:]
        w = torch.cat(mats, 1)[row].double()
        h = covariance.damped
        best = torch.linalg.solve(parts @ h @ parts.T, parts @ h @ w)
        torch.testing.assert_close(problem.scale[row].double(), best, rtol=1e-4, atol=0)


@SETTINGS
@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    grid=st.sampled_from(["uniform", "paper"]),
    tying=st.sampled_from([("row", None), ("group", 5), ("cluster", None), ("model", None)]),
    cols=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    rows=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_never_worse_than_plain_rounding_and_on_the_grid(bits, grid, tying, cols, rows, seed):
    spec = spec_of(bits, grid, *tying)
    mats = [weights(rows, c, seed + k) for k, c in enumerate(cols)]
    mats[0][0] = 0.0  # a row of zeros
    x = correlated(sum(cols), seed, n=3 + seed % 50)
    x[:, 0] = 0.0  # an input that is always zero
    covariance = covariance_of(x)
    found = round_cluster(mats, spec, [Joined((0, 1), covariance)])
    plain = project_cluster(mats, spec)
    ours, theirs = (output_error(mats, r.values, covariance) for r in (found, plain))
    if tying[0] in ("row", "group"):
        assert bool((ours <= theirs * (1 + 1e-6) + 1e-12).all())
    assert float(ours.sum()) <= float(theirs.sum()) * (1 + 1e-6) + 1e-12
    levels = make_grid(grid, bits).levels_tensor(dtype=torch.float32)
    for value, scale, code, mat in zip(found.values, found.scales, found.codes, mats):
        assert torch.equal(scale, scale.half().float())
        size = mat.shape[1] if tying[1] is None else tying[1]
        spread = scale if tying[1] is None else scale.repeat_interleave(size, 1)[:, : mat.shape[1]]
        assert torch.equal(value, spread * levels[code.long()])
    again = project_cluster(found.values, spec)  # what packing does
    for value, packed in zip(found.values, again.values):
        assert torch.equal(value, packed)
    assert not bool(found.values[0][0].any()) or tying[0] in ("cluster", "model")


def test_matrices_of_several_inputs_share_one_scale():
    """A sublayer with one scale: three matrices read x, one reads another input."""
    mats = [weights(8, 12, k) for k in range(3)] + [weights(12, 8, 9)]
    a, b = covariance_of(correlated(12, 1)), covariance_of(correlated(8, 2))
    spec = spec_of(2, tying="cluster")
    joined = [*(Joined((k,), a) for k in range(3)), Joined((3,), b)]
    found, plain = round_cluster(mats, spec, joined), project_cluster(mats, spec)
    errors = [
        sum(
            float(output_error([mats[k]], [r.values[k]], c.covariance).sum())
            for k, c in enumerate(joined)
        )
        for r in (found, plain)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert len({float(s) for s in found.scales}) == 1


def test_near_the_best_of_all_codes():
    """Two levels, eight columns: 256 codes a row, each with its best scale."""
    w, covariance = weights(40, 8, 3), covariance_of(correlated(8, 5))
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64)
    h = covariance.matrix
    top, bottom = w.double() @ h @ codes.T, ((codes @ h) * codes).sum(1)
    norm = ((w.double() @ h) * w.double()).sum(1)
    best = (norm[:, None] - top.clamp(min=0).square() / bottom).amin(1)
    found = round_cluster([w], spec_of(1), [Joined((0,), covariance)], rounds=4)
    ours = output_error([w], found.values, covariance)
    plain = output_error([w], project_cluster([w], spec_of(1)).values, covariance)
    assert float((ours - best).sum()) < 0.2 * float((plain - best).sum())


def test_learned_levels():
    grid = Grid("codebook", 2, (-7, -2, 1, 6))
    w, covariance = weights(12, 30, 1), covariance_of(correlated(30, 2))
    found = round_cluster([w], spec_of(2, grid), [Joined((0,), covariance)])
    plain = project_cluster([w], spec_of(2, grid))
    errors = [float(output_error([w], r.values, covariance).sum()) for r in (found, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_uncorrelated_inputs_are_rounded_plainly():
    w = weights(10, 16, 1)
    found = round_cluster([w], spec_of(2), [Joined((0,), Covariance(torch.eye(16)))])
    plain = project_cluster([w], spec_of(2))
    torch.testing.assert_close(found.values[0], plain.values[0])


def test_inputs_that_are_all_zero_leave_plain_rounding():
    w = weights(4, 6, 1)
    found = round_cluster([w], spec_of(2), [Joined((0,), Covariance(torch.zeros(6, 6)))])
    torch.testing.assert_close(found.values[0], project_cluster([w], spec_of(2)).values[0])


def test_the_result_does_not_depend_on_tiles(monkeypatch):
    w, covariance = weights(20, 24, 1), covariance_of(correlated(24, 2))
    whole = round_cluster([w], spec_of(2), [Joined((0,), covariance)])
    monkeypatch.setattr(second_order, "TILE", 50)
    tiled = round_cluster([w], spec_of(2), [Joined((0,), covariance)])
    assert torch.equal(whole.codes[0], tiled.codes[0])


def test_mean_shift_keeps_the_mean_of_the_outputs():
    f, x, mats = correlated(9, 1) + 0.7, correlated(9, 2), [weights(4, 5, 1), weights(4, 4, 2)]
    values = [m.round() for m in mats]
    fp_means, means = ([v[:, :5].mean(0), v[:, 5:].mean(0)] for v in (f, x))
    shift = mean_shift(mats, values, fp_means, means)
    before = (f @ torch.cat(mats, 1).T).mean(0)
    after = (x @ torch.cat(values, 1).T).mean(0) + shift
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [16, 32])
def test_float_clusters_stay_what_they_are(bits):
    w = weights(3, 4, 1)
    found = round_cluster([w], spec_of(bits), [Joined((0,), Covariance(torch.eye(4)))])
    assert torch.equal(found.values[0], w.half().float() if bits == 16 else w)


def test_covariances_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="does not fit"):
        round_cluster([weights(3, 4, 1)], spec_of(), [Joined((0,), Covariance(torch.eye(5)))])
    with pytest.raises(InputError, match="one input"):
        round_cluster([weights(3, 4, 1)] * 2, spec_of(), [Joined((0,), Covariance(torch.eye(4)))])
    for bad in (torch.zeros(2, 3), torch.full((2, 2), float("nan")), -torch.eye(2)):
        with pytest.raises(InputError, match="not a covariance"):
            Covariance(bad)
