"""mpq_transformer in the host: names, strict loading, ADMM training, resuming."""

from __future__ import annotations

import math
import re

import pytest
import torch
from found import find_clusters, get_mats, rest_parameters
from lm_runs import ADMM, EXTRA, assert_on_grid, assert_same, checkpoint, lm_of, load

from espnet_mpq.errors import MismatchError, PlanError
from espnet_mpq.hosts.espnet.families import architecture_of
from espnet_mpq.training.admm import STATE_KEY

# 15 is divisible by the 3 heads, and nothing else by anything.
CONF = dict(
    embed_unit=9,
    att_unit=15,
    head=3,
    unit=13,
    layer=2,
    dropout_rate=0.1,
    positional_dropout_rate=0.1,
    attention_dropout_rate=0.1,
)
PLAN = {
    "format": "espnet_mpq.plan",
    "version": 1,
    "clusters": {
        "embedding": {"bits": 4},
        "blocks.0.attention": {"bits": 2},
        "blocks.0.feed_forward": {"bits": 2, "tying": "group", "group_size": 4},
        "blocks.1.attention": {"bits": 16},
        "blocks.1.feed_forward": {"bits": 1, "grid": "uniform", "tying": "row"},
        "output": {"bits": 8, "tying": "cluster"},
    },
}


@pytest.fixture(scope="module")
def fp(train, tmp_path_factory):
    """Checkpoint of a stock Transformer LM, trained by the host's own classes."""
    folder = tmp_path_factory.mktemp("fp") / "lm"
    train(folder, lm="transformer", model="lm", max_epoch=6, lm_conf=CONF)
    return folder / "valid.loss.best.pth"


@pytest.fixture(scope="module")
def run(train, fp):
    """run(folder, **settings): mpq_transformer with PLAN from the stock LM."""

    def start(folder, **settings):
        settings = {**ADMM, "lm_conf": CONF, **settings}
        return train(folder, PLAN, lm="mpq_transformer", init_param=[str(fp)], **settings)

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "lm")


def build(host, **conf):
    return host.lm_choices.get_class("mpq_transformer")(21, **{**CONF, **conf})


@pytest.mark.parametrize("pos_enc, width", [(None, 15), ("sinusoidal", 12)])
def test_is_the_hosts_own_class_with_its_names_and_numbers(host, pos_enc, width):
    from espnet2.lm.transformer_lm import TransformerLM

    conf = {**CONF, "pos_enc": pos_enc, "att_unit": width}
    torch.manual_seed(0)
    theirs = TransformerLM(21, **conf).eval()
    ours = build(host, pos_enc=pos_enc, att_unit=width).eval()
    assert isinstance(ours, TransformerLM)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ids = torch.tensor([[20, 3, 7, 0, 5], [20, 4, 4, 9, 1]])
    assert torch.equal(ours(ids, None)[0], theirs(ids, None)[0])


def test_plans_of_other_lms_and_foreign_checkpoints_are_refused(host):
    with pytest.raises(PlanError, match=r"blocks\.2\.attention"):
        build(host, plan=PLAN, layer=3)
    with pytest.raises(PlanError, match=r"blocks\.1\.attention"):
        build(host, plan=PLAN, layer=1)
    lm = build(host, plan=PLAN)
    state = lm.state_dict()
    del state["encoder.encoders.1.norm2.bias"]
    with pytest.raises(MismatchError, match=r"no encoder\.encoders\.1\.norm2\.bias \(1 tensors"):
        lm.load_state_dict(state, strict=False)


def test_training_leaves_every_file_on_the_grid(host, whole, fp):
    for name in ("2epoch.pth", "3epoch.pth", "valid.loss.ave_2best.pth"):
        if (whole / name).exists():
            assert_on_grid(lm_of(host, whole, name))
    saved = checkpoint(whole)
    assert set(saved["model"]) == set(load(fp)) == set(load(whole / "3epoch.pth"))
    state = saved["optimizers"][0][STATE_KEY]
    assert state["n_updates"] == 15 and state["finishing"] is not None
    stats = saved["reporter"]["stats"][3]["valid"]
    assert stats["admm_primal"] == 0.0 and stats["ppl"] == pytest.approx(math.exp(stats["loss"]))


def test_finishing_moves_biases_norms_and_scales_but_no_code(whole):
    """Epochs 2 and 3 are both on the grid; the third is the finishing one."""
    before, after = (load(whole / f"{n}epoch.pth") for n in (2, 3))
    for name in ("decoder.bias", "encoder.after_norm.weight", "encoder.encoders.0.norm1.bias"):
        assert not torch.equal(before[f"lm.{name}"], after[f"lm.{name}"]), name
    name = "lm.encoder.encoders.1.feed_forward.w_1.weight"  # 1 bit, one scale a row
    assert torch.equal(after[name].sign(), before[name].sign())
    assert not torch.equal(after[name], before[name])


def test_every_parameter_is_in_one_cluster_or_stays_float(host):
    lm = build(host)
    clusters = find_clusters(lm)
    n_weights = sum(c.n_weights for c in clusters)
    rest = rest_parameters(lm, clusters)
    assert n_weights + sum(math.prod(s) for _, s in rest) == sum(p.numel() for p in lm.parameters())
    kept = re.compile(r".*(bias|norm\d?\.weight|embed\.1\.weight)")
    assert all(kept.fullmatch(name) for name, _ in rest)
    ids = torch.tensor([[20, 3, 7, 2, 5]])
    lm.eval()
    with torch.no_grad():
        right = lm(ids, None)[0]
        for cluster in clusters:
            for mat in get_mats(lm, cluster):  # every part of every cluster moves the output
                kept = mat.clone()
                mat.mul_(-1.0)
                assert (lm(ids, None)[0] - right).abs().max() > 1e-4, cluster.name
                mat.copy_(kept)
        assert torch.equal(lm(ids, None)[0], right)


def test_extragradient_and_distillation_resume_bit_identical(run, tmp_path, monkeypatch):
    from espnet_mpq.hosts.espnet.training.trainer import MpqTrainer

    right = run(tmp_path / "right", **EXTRA)
    assert checkpoint(right)["reporter"]["stats"][1]["train"]["kl"] > 0
    stock = MpqTrainer.validate_one_epoch.__func__
    seen = []

    def interrupted(cls, **arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return stock(cls, **arguments)

    monkeypatch.setattr(MpqTrainer, "validate_one_epoch", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "lm", **EXTRA)
    monkeypatch.undo()
    run(tmp_path / "lm", **EXTRA)
    for name in ("3epoch.pth", "valid.loss.ave_2best.pth"):
        assert_same(tmp_path / "lm" / name, right / name)


def test_the_architecture_is_the_one_of_the_host(host):
    """Names, order and shapes of parameters, and the defaults of every size."""
    from espnet2.lm.transformer_lm import TransformerLM

    for conf in (CONF, {"pos_enc": "sinusoidal", "layer": 1}, {}):
        arch = architecture_of("transformer", conf, 21)
        theirs = {n: tuple(p.shape) for n, p in TransformerLM(21, **conf).named_parameters()}
        assert list(arch.state_shapes().items()) == list(theirs.items())
