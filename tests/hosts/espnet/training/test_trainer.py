"""The trainer inside the host: files on the grid, options, stock behaviour."""

from __future__ import annotations

import re

import pytest
import torch
from found import find_clusters, weights_of
from lm_runs import (
    ADMM,
    CHARS,
    EXTRA,
    PLAN,
    assert_on_grid,
    assert_same,
    checkpoint,
    lm_of,
    load,
)

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.training.admm import STATE_KEY


def test_epoch_files_best_model_and_averages_lie_on_the_grid(host, whole):
    for name in ("2epoch.pth", "3epoch.pth", "valid.loss.best.pth", "valid.loss.ave_2best.pth"):
        if (whole / name).exists():
            assert_on_grid(lm_of(host, whole, name))
    average = whole / "valid.loss.ave_2best.pth"
    assert average.exists() and not average.is_symlink()
    assert not (whole / "checkpoint.prev.pth").exists()


def test_the_checkpoint_holds_float_weights_and_duals_the_epoch_files_do_not(whole, fp):
    saved = checkpoint(whole)
    assert_keys = set(load(fp))
    assert set(saved["model"]) == assert_keys == set(load(whole / "3epoch.pth"))
    state = saved["optimizers"][0][STATE_KEY]
    assert state["n_updates"] == 15 and state["finishing"] is not None


def test_validation_is_that_of_the_saved_model(host, train, whole):
    stats = checkpoint(whole)["reporter"]["stats"]
    model, args = host.LMTask.build_model_from_file(
        str(whole / "config.yaml"), str(whole / "3epoch.pth")
    )
    model.eval()
    total = count = 0.0
    preprocess = host.LMTask.build_preprocess_fn(args, train=False)
    path = args.valid_data_path_and_name_and_type[0][0]
    for line in open(path, encoding="utf-8"):
        key, text = line.rstrip("\n").split(maxsplit=1)
        ids = torch.from_numpy(preprocess(key, {"text": text})["text"])[None]
        loss, _, weight = model(ids, torch.tensor([ids.shape[1]]))
        total, count = total + float(loss.detach()) * float(weight), count + float(weight)
    loss = total / count
    assert stats[3]["valid"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert stats[3]["valid"]["ppl"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)


def test_residuals_and_gamma_are_reported_in_every_epoch(whole):
    stats = checkpoint(whole)["reporter"]["stats"]
    assert all(
        {"loss", "ppl", "admm_primal", "admm_dual", "admm_gamma"} <= set(stats[e]["valid"])
        for e in (1, 2, 3)
    )
    assert 0.01 < stats[1]["valid"]["admm_primal"] < 1.0
    assert stats[3]["valid"]["admm_primal"] == 0.0  # finishing: on the grid all the time
    assert stats[2]["valid"]["admm_gamma"] >= stats[1]["valid"]["admm_gamma"] >= 0.05


def test_figures_and_tensorboard_show_them(train, fp, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    folder = train(
        tmp_path / "lm",
        PLAN,
        init_param=[str(fp)],
        max_epoch=2,
        mpq_finish_epochs=0,
        use_matplotlib=True,
        use_tensorboard=True,
    )
    for name in ("ppl", "admm_primal", "admm_dual", "admm_gamma"):
        assert (folder / "images" / f"{name}.png").stat().st_size > 0
    events = b"".join(p.read_bytes() for p in (folder / "tensorboard" / "valid").iterdir())
    assert b"admm_primal" in events and b"ppl" in events


def test_extragradient_replays_the_window_of_the_host(train, fp, tmp_path, monkeypatch):
    """With eta1 -> 0 the second gradient is the first: any other batch or mask would show."""
    pairs = []

    from espnet_mpq.training.admm import AdmmController

    def compare(self):
        first = [p.grad.clone() for p in self.weights.module.parameters()]
        for p in self.weights.module.parameters():
            p.grad.zero_()
        self.gradient_at()
        pairs.append([(a, p.grad.clone()) for a, p in zip(first, self.weights.module.parameters())])
        self._add_penalty()

    monkeypatch.setattr(AdmmController, "_extragradient", compare)
    options = dict(EXTRA, accum_grad=2, max_epoch=1, mpq_finish_epochs=0, grad_clip=0.5)
    train(tmp_path / "lm", PLAN, init_param=[str(fp)], **options)
    assert len(pairs) == 2  # 5 batches: two full windows
    for pair in pairs:
        for first, second in pair:
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-8)


def test_without_a_plan_the_trainer_is_stock(host, train, fp, tmp_path, monkeypatch):
    from espnet2.train.trainer import Trainer

    settings = dict(init_param=[str(fp)], lm="seq_rnn", model="lm", max_epoch=2)
    ours = train(tmp_path / "ours", **settings)
    same = train(tmp_path / "same", init_param=[str(fp)], max_epoch=2)  # mpq classes, no plan
    monkeypatch.setattr(host.LMTask, "trainer", Trainer)
    monkeypatch.setattr(Trainer, "add_arguments", classmethod(lambda cls, parser: None))
    stock = train(tmp_path / "stock", **settings)
    for name in ("2epoch.pth", "valid.loss.ave_2best.pth"):
        assert_same(ours / name, stock / name)
        assert_same(same / name, stock / name)
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in stock.iterdir())
    valid = [checkpoint(f)["reporter"]["stats"][2]["valid"] for f in (ours, stock)]
    assert set(valid[0]) == set(valid[1]) and valid[0]["loss"] == valid[1]["loss"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mpq_gamma=-1.0), "gamma"),
        (dict(mpq_saved="nonsense"), "saved"),
        (dict(mpq_distill=1.5), "mpq_distill"),
        (dict(mpq_distill=0.5, init_param=[]), "no teacher"),
        (dict(mpq_distill=0.5, model="lm"), "mpq_lm"),
        (dict(mpq_distill=0.5, mpq_teacher="nowhere.pth"), "nowhere.pth"),
        (dict(mpq_finish_epochs=9), "mpq_finish_epochs"),
    ],
)
def test_nonsense_options_are_one_clear_error(train, fp, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "lm", PLAN, **{"init_param": [str(fp)], **settings})


def test_distillation_pulls_to_the_teacher_which_is_not_saved(train, fp, tmp_path):
    options = dict(ADMM, max_epoch=1, mpq_finish_epochs=0, mpq_teacher=str(fp))
    folder = train(tmp_path / "lm", PLAN, mpq_distill=0.5, init_param=[str(fp)], **options)
    stats = checkpoint(folder)["reporter"]["stats"][1]
    assert 0.0 < stats["train"]["kl"] < stats["train"]["loss"]
    assert "kl" not in stats["valid"]
    assert set(load(folder / "1epoch.pth")) == set(load(fp))


def test_checkpoint_of_another_lm_is_refused(host, whole, tmp_path):
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(MismatchError, match="does not belong"):
        host.LMTask.build_model_from_file(str(whole / "config.yaml"), str(tmp_path / "foreign.pth"))


def test_options_appear_in_help_and_config(host, whole):
    text = (whole / "config.yaml").read_text(encoding="utf-8")
    assert re.search(r"^mpq_gamma: 0.05$", text, re.M)
    options = host.LMTask.trainer.build_options
    assert options.__func__.__qualname__.startswith("MpqTrainer")


def test_amp_without_a_gpu_changes_nothing(train, fp, tmp_path):
    options = dict(EXTRA, max_epoch=1, mpq_finish_epochs=0)
    plain, amp = (
        train(tmp_path / str(on), PLAN, init_param=[str(fp)], use_amp=on, **options)
        for on in (False, True)
    )
    assert_same(plain / "1epoch.pth", amp / "1epoch.pth")


def test_a_transformer_lm_with_a_plan_trains_too(host):
    from espnet2.lm.transformer_lm import TransformerLM

    from espnet_mpq.plan import uniform_plan
    from espnet_mpq.training.admm import AdmmController
    from espnet_mpq.training.options import AdmmOptions

    torch.manual_seed(0)
    lm = TransformerLM(len(CHARS), embed_unit=8, att_unit=8, head=2, unit=16, layer=2)
    lm.plan = uniform_plan(find_clusters(lm), 2)
    model = host.model_choices.get_class("mpq_lm")(lm=lm, vocab_size=len(CHARS))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = AdmmController(
        weights_of(lm), lm.plan, optimizer, AdmmOptions(dual_period=2, finish_epochs=1)
    )
    text = torch.randint(2, 20, (4, 9), generator=torch.Generator().manual_seed(2))
    losses = []
    for epochs_left in (3, 2, 1):
        controller.start_epoch(epochs_left)
        for _ in range(10):
            optimizer.zero_grad()
            loss, _, _ = model(text, torch.full((4,), 9))
            loss.backward()
            optimizer.step()
        controller.end_epoch()
        assert_on_grid(lm)
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
