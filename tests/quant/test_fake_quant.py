"""Fake quantization of clusters: tyings, shared scales, straight-through gradients."""

from types import SimpleNamespace

import pytest
import torch

from espnet_mpq.errors import InputError
from espnet_mpq.quant.distortion import relative_error
from espnet_mpq.quant.fake_quant import project_cluster, project_clusters, straight_through
from espnet_mpq.quant.grid import Grid, make_grid
from espnet_mpq.quant.projection import project
from espnet_mpq.quant.scale import scale_shapes
from espnet_mpq.quant.spec import ClusterSpec


def _spec(bits, grid="uniform", tying="row", group_size=None):
    return SimpleNamespace(bits=bits, grid=grid, tying=tying, group_size=group_size)


def _mats(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(6, 10) * torch.rand(6, 1), torch.randn(6, 7)]


TYINGS = [("model", None), ("cluster", None), ("row", None), ("group", 4), ("group", 99)]


@pytest.mark.parametrize("tying, group_size", TYINGS)
@pytest.mark.parametrize("bits", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("method", ("mse", "als"))
def test_scales_times_levels_are_the_values(bits, tying, group_size, method):
    mats, spec = _mats(), _spec(bits, "uniform", tying, group_size)
    found = project_cluster(mats, spec, method=method)
    levels = make_grid("uniform", bits).levels_tensor(dtype=torch.float32)
    shapes = scale_shapes([tuple(m.shape) for m in mats], tying, group_size)
    for mat, scale, code, value, shape in zip(
        mats, found.scales, found.codes, found.values, shapes
    ):
        assert code.dtype == torch.uint8 and code.shape == mat.shape == value.shape
        assert tuple(scale.shape) == shape and scale.dtype == torch.float32
        if group_size:
            scale = scale.repeat_interleave(group_size, 1)[:, : mat.shape[1]]
        assert torch.equal(scale * levels[code.long()], value)


@pytest.mark.parametrize("tying, group_size", TYINGS)
def test_every_block_is_projected_alone(tying, group_size):
    mats, grid = _mats(), make_grid("paper", 4)
    found = project_cluster(mats, _spec(4, "paper", tying, group_size))
    if tying in ("model", "cluster"):
        together = torch.cat([mat.reshape(1, -1) for mat in mats], 1)
        expected = project(together, grid)
        assert found.scales[0] is found.scales[1]
        assert torch.equal(found.scales[0], expected.scale)
        joined = torch.cat([value.reshape(1, -1) for value in found.values], 1)
        assert torch.equal(joined, expected.values)
        return
    for mat, scales, values in zip(mats, found.scales, found.values):
        size = group_size or mat.shape[1]
        for r in range(mat.shape[0]):
            for g, start in enumerate(range(0, mat.shape[1], size)):
                columns = slice(start, start + size)
                expected = project(mat[r : r + 1, columns], grid)
                assert torch.equal(values[r : r + 1, columns], expected.values)
                assert scales[r, g] == expected.scale[0, 0]


def test_finer_tying_means_less_error():
    mats = _mats()
    errors = []
    for tying, group_size in (("cluster", None), ("row", None), ("group", 5), ("group", 1)):
        found = project_cluster(mats, _spec(2, "uniform", tying, group_size))
        errors.append(sum(relative_error(m, v) for m, v in zip(mats, found.values)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6


def test_floats_of_16_and_32_bits():
    mats = [torch.tensor([[0.1, 1e-9, 3.0]])]
    half = project_cluster(mats, _spec(16))
    assert torch.equal(half.values[0], mats[0].half().float())
    assert half.codes is None and half.scales is None
    assert torch.equal(project_cluster(mats, _spec(32)).values[0], mats[0])


@pytest.mark.parametrize("tying, group_size", TYINGS)
def test_warm_start_takes_the_scales_of_an_earlier_result(tying, group_size):
    mats, spec = _mats(), _spec(4, "uniform", tying, group_size)
    first = project_cluster(mats, spec)
    # Without rounds the start itself is the answer, so each scale must reach its own block.
    kept = project_cluster(mats, spec, method="als", init=first.scales, rounds=0)
    for a, b in zip(first.values + first.scales, kept.values + kept.scales):
        assert torch.equal(a, b)


def test_one_scale_for_the_model():
    mats = {"a": _mats(0), "b": _mats(1), "c": _mats(2), "d": _mats(3)}
    shared, other = ClusterSpec(2, tying="model"), ClusterSpec(4, tying="model")
    specs = {"a": shared, "b": other, "c": shared, "d": ClusterSpec(2, tying="cluster")}
    found = project_clusters(mats, specs)
    assert list(found) == list(mats)
    assert len({id(scale) for name in "ac" for scale in found[name].scales}) == 1
    flat = [*mats["a"], *mats["c"]]
    expected = project_cluster(flat, ClusterSpec(2, tying="cluster"))
    values = found["a"].values + found["c"].values
    assert all(torch.equal(a, b) for a, b in zip(values, expected.values))
    for name in "bd":
        alone = project_cluster(mats[name], specs[name])
        assert all(torch.equal(a, b) for a, b in zip(found[name].codes, alone.codes))
    # A warm start without rounds: the shared scale reaches both clusters.
    init = {name: done.scales for name, done in found.items()}
    kept = project_clusters(mats, specs, init=init, method="als", rounds=0)
    assert torch.equal(kept["c"].scales[0], found["a"].scales[0])


def test_learned_levels():
    grid = Grid("codebook", 2, (-4, -1, 1, 4))
    found = project_cluster(_mats(), _spec(2, grid))
    level = found.values[0] / found.scales[0]
    assert set(level.round().flatten().tolist()) <= {-4.0, -1.0, 1.0, 4.0}
    with pytest.raises(InputError, match="levels of its own"):
        project_cluster(_mats(), _spec(2, "codebook"))


def test_gradients_do_not_reach_the_projection():
    mats = [torch.nn.Parameter(mat) for mat in _mats()]
    found = project_cluster(mats, _spec(2))
    assert not any(value.requires_grad for value in found.values)


def test_straight_through():
    w = torch.tensor([[0.3, -0.7, 1e-8]], requires_grad=True)
    values = torch.tensor([[0.1, -1.0, 3.0]], requires_grad=True)
    y = straight_through(w, values)
    assert torch.equal(y, values)  # exactly, where w + (values - w) would round
    (y * torch.tensor([[1.0, 2.0, 5.0]])).sum().backward()
    assert w.grad.tolist() == [[1.0, 2.0, 5.0]] and values.grad is None
