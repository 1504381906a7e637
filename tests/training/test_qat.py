"""Quantization-aware training: one update by hand, starts, schedules, resuming, learning."""

import io

import pytest
import torch
from admm_runs import assert_on_grid
from found import find_clusters, get_mats, weights_of

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.training.on_grid import OnGrid, project, stored_mats
from espnet_mpq.training.options import QatOptions
from espnet_mpq.training.qat import STATE_KEY, QatController, into_cells


def make(lm, plan=None, optimizer=None, n_updates=None, start=None, **options):
    plan = plan or uniform_plan(find_clusters(lm), 2)
    optimizer = optimizer or torch.optim.SGD(lm.parameters(), lr=0.1)
    qat = QatController(weights_of(lm), plan, optimizer, QatOptions(**options), start)
    qat.n_updates_in_epoch = n_updates
    return qat, optimizer


def update(lm, optimizer, cross_entropy):
    optimizer.zero_grad()
    loss = cross_entropy(lm)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_one_update_by_hand(small_rnn, cross_entropy):
    """Straight through inside the range, LSQ's slope for the scale, W kept as floats."""
    lm = small_rnn()
    with torch.no_grad():
        lm.decoder.weight[3, 2] = 5.0  # far outside the range of its row
    fp = lm.decoder.weight.detach().clone()
    qat, optimizer = make(lm, decay=False)
    qat.start_epoch(1)
    scale = qat.tuned.table.scales["output"][0].clone()
    codes = qat.tuned.table.codes["output"][0]
    levels = make_grid("uniform", 2).values(codes)
    torch.testing.assert_close(lm.decoder.weight.detach(), scale * levels)
    optimizer.zero_grad()
    cross_entropy(lm).backward()
    gradient = lm.decoder.weight.grad.clone()
    optimizer.step()

    inside = (fp / scale).abs() <= 4  # levels -3 -1 1 3: half a step beyond the outer ones
    assert not bool(inside[3, 2]) and float(inside.float().mean()) > 0.9
    moved = fp - 0.1 * gradient * inside
    torch.testing.assert_close(qat.floats["output"][0], moved)
    slope = torch.where(inside, levels - fp / scale, levels)
    wanted = (gradient * slope).sum(1, keepdim=True)  # dL/dα of every row
    # The first step of Adam is its learning rate against the sign.
    exact = scale * torch.exp(-0.1 * wanted.sign())
    now = qat.tuned.current().scales["output"][0]
    torch.testing.assert_close(now, exact.half().float(), rtol=1e-3, atol=0)
    # What the module holds: the nearest levels to the moved weights at the moved scale.
    grid = make_grid("uniform", 2)
    expected = grid.levels_of(grid.codes_of(moved / now)) * now
    torch.testing.assert_close(lm.decoder.weight.detach(), expected)


def test_the_first_forward_pass_is_that_of_the_start(small_rnn):
    """Codes that are not the nearest ones: the float weights move just inside their cells."""
    lm = small_rnn()
    plan = uniform_plan(find_clusters(lm), 2, tying="group", group_size=3)
    mats = {c.name: [m.clone() for m in get_mats(lm, c)] for c in find_clusters(lm)}
    table = project(mats, plan)
    generator = torch.Generator().manual_seed(1)
    for codes in table.codes.values():
        for code in codes:
            other = torch.randint(0, 4, code.shape, generator=generator, dtype=torch.uint8)
            is_other = torch.rand(code.shape, generator=generator) < 0.2
            code.copy_(torch.where(is_other, other, code))
    start = OnGrid(plan, table.scales, {n: list(codes) for n, codes in table.codes.items()})
    qat, _ = make(lm, plan, start=start)
    qat.start_epoch(1)
    for cluster in find_clusters(lm):
        for mat, value in zip(get_mats(lm, cluster), table.values(cluster.name)):
            assert torch.equal(mat, value)
    grid = make_grid("uniform", 2)
    moved = into_cells(mats["output"], table, "output", grid)[0]
    spread = table.scales["output"][0].repeat_interleave(3, 1)[:, :8]
    assert torch.equal(grid.codes_of(moved / spread).byte(), table.codes["output"][0])
    nearest = grid.codes_of(mats["output"][0] / spread).byte() == table.codes["output"][0]
    gap = ((mats["output"][0] - moved) / spread)[nearest].abs()
    assert float(gap.max()) <= 0.04 + 1e-5  # MARGIN of a step of 2


def test_the_learning_rate_falls_to_zero_and_the_codes_freeze(small_rnn, cross_entropy):
    lm = small_rnn()
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.02)
    qat, _ = make(lm, optimizer=optimizer, n_updates=10, warmup=3, freeze=0.3)
    factors, codes = [], []
    for epoch in range(2):
        qat.start_epoch(2 - epoch)
        for _ in range(10):
            factors.append(qat.lr_factor())
            update(lm, optimizer, cross_entropy)
            assert optimizer.param_groups[0]["lr"] == 0.02
            codes.append(qat.tuned.table.codes["embedding"][0].clone())
        qat.end_epoch()
    assert factors[0] == 0.25 and factors[3] == pytest.approx(0.85)
    assert factors[4:] == pytest.approx([1 - k / 20 for k in range(4, 20)])
    assert not torch.equal(codes[0], codes[13])
    assert all(torch.equal(codes[13], code) for code in codes[13:])
    assert qat.stats(1.0)["qat_frozen"] == 1.0
    assert_on_grid(lm, qat.plan)


def test_scales_and_float_rest_go_on_when_codes_are_frozen(small_rnn, cross_entropy):
    lm = small_rnn()
    clusters = {c.name: ClusterSpec(2) for c in find_clusters(lm)}
    clusters["rnn.l0.f"] = ClusterSpec(16)
    qat, optimizer = make(lm, Plan(clusters), n_updates=4, freeze=1.0)
    qat.start_epoch(1)
    update(lm, optimizer, cross_entropy)
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}
    codes = qat.tuned.table.codes["output"][0].clone()
    update(lm, optimizer, cross_entropy)
    assert torch.equal(codes, qat.tuned.table.codes["output"][0])
    for name in ("decoder.bias", "decoder.weight", "rnn.weight_hh_l0"):
        assert not torch.equal(before[name], dict(lm.named_parameters())[name])
    half = get_mats(lm, find_clusters(lm)[2])[0]
    assert torch.equal(half, half.half().float())


def test_blend_and_pull(small_rnn, cross_entropy):
    lm = small_rnn()
    fp = lm.decoder.weight.detach().clone()
    qat, optimizer = make(lm, n_updates=8, blend=0.5, pull_period=2, pull=0.25)
    qat.start_epoch(1)
    assert torch.equal(lm.decoder.weight, fp)  # all W at first
    update(lm, optimizer, cross_entropy)
    q = stored_mats(qat.floats, qat.tuned.current())["output"][0]
    w = qat.floats["output"][0]
    torch.testing.assert_close(lm.decoder.weight.detach(), w + 0.25 * (q - w))
    qat.end_epoch()
    assert_on_grid(lm, qat.plan)
    qat.start_epoch(1)
    # The pull halves nothing but the distance: by a quarter.
    seen = {}
    kept = qat._copy

    def spy(names=None):
        seen["w"] = kept(names)
        return {n: [m.clone() for m in mats] for n, mats in seen["w"].items()}

    qat._copy = spy
    update(lm, optimizer, cross_entropy)
    q = stored_mats(seen["w"], qat.tuned.current())["output"][0]
    torch.testing.assert_close(qat.floats["output"][0], torch.lerp(seen["w"]["output"][0], q, 0.25))


@pytest.mark.parametrize("tying", ["row", "model"])
def test_resumed_run_is_bit_identical(small_rnn, cross_entropy, tying):
    def begin():
        lm = small_rnn(dropout_rate=0.3)
        clusters = {c.name: ClusterSpec(2, tying=tying) for c in find_clusters(lm)}
        clusters["output"] = ClusterSpec(16)
        optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
        options = dict(freeze=0.3, blend=0.3, pull_period=4)
        qat, _ = make(lm, Plan(clusters), optimizer, 5, **options)
        return lm, optimizer, qat

    def train(lm, optimizer, qat, epochs):
        for epoch in epochs:
            torch.manual_seed(epoch)
            qat.start_epoch(5 - epoch + 1)
            lm.train()
            for _ in range(5):
                update(lm, optimizer, cross_entropy)
            qat.end_epoch()

    whole, optimizer, qat = begin()
    train(whole, optimizer, qat, range(1, 6))
    for stop in (1, 2, 4):  # while it blends, in between, with frozen codes
        lm, optimizer, qat = begin()
        train(lm, optimizer, qat, range(1, stop + 1))
        file = io.BytesIO()
        torch.save({"model": lm.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file)
        again, optimizer, qat = begin()
        again.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(again, optimizer, qat, range(stop + 1, 6))
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), (stop, name)


def test_training_ends_below_the_loss_of_rounding(small_rnn, cross_entropy):
    lm = small_rnn()
    float_optimizer = torch.optim.Adam(lm.parameters(), lr=0.03)
    for _ in range(60):
        float_optimizer.zero_grad()
        cross_entropy(lm).backward()
        float_optimizer.step()
    fp = float(cross_entropy(lm).detach())
    optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
    qat, _ = make(lm, uniform_plan(find_clusters(lm), 1), optimizer, 60)
    qat.start_epoch(1)
    rounded = float(cross_entropy(lm))
    for _ in range(60):
        update(lm, optimizer, cross_entropy)
    qat.end_epoch()
    assert_on_grid(lm, qat.plan)
    assert fp < rounded and float(cross_entropy(lm)) < fp + 0.4 * (rounded - fp)


def test_mistakes_are_said(small_rnn, cross_entropy):
    lm = small_rnn()
    qat, optimizer = make(lm)
    cross_entropy(lm).backward()
    with pytest.raises(InputError, match="before start_epoch"):
        optimizer.step()
    state = optimizer.state_dict()
    with pytest.raises(MismatchError, match="no QAT state"):
        optimizer.load_state_dict({k: v for k, v in state.items() if k != STATE_KEY})
    four, other = make(small_rnn(), uniform_plan(find_clusters(lm), 4))
    with pytest.raises(MismatchError, match="another plan"):
        other.load_state_dict(state)
    for name, value in (("freeze", 1.5), ("warmup", 2.5), ("pull", "x"), ("decay", 1)):
        with pytest.raises(InputError, match=name):
            QatOptions(**{name: value})
