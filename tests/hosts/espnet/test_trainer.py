"""The trainer inside the host: files on the grid, resume, kill, DDP, stock behaviour."""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import shutil
import signal

import pytest
import torch

from espnet_mpq.clusters import find_clusters, get_mats
from espnet_mpq.errors import FormatError, InputError, MismatchError
from espnet_mpq.quant.fake_quant import project_cluster
from espnet_mpq.training.admm import STATE_KEY

CHARS = ["<blank>", "<unk>", "<space>", *"abcdefghijklmnopqrstuvwxyz", "'", "<sos/eos>"]
GATES = [f"rnn.l0.{gate}" for gate in "ifgo"]
PLAN = {
    "format": "espnet_mpq.plan",
    "version": 1,
    "clusters": {
        "embedding": {"bits": 4},
        **{name: {"bits": 2} for name in GATES},
        "rnn.l0.o": {"bits": 16},
        "output": {"bits": 1, "grid": "uniform", "tying": "row"},
    },
}
ADMM = dict(mpq_gamma=0.05, mpq_dual_period=3, mpq_finish_epochs=1)


@pytest.fixture(scope="module")
def train(host, tiny_text, tmp_path_factory):
    """train(folder, plan=..., **host settings): the host's lm_train in this process."""
    import yaml

    data = tmp_path_factory.mktemp("lm_data")
    for name, lines in (("train", tiny_text[:40]), ("valid", tiny_text[40:50])):
        keys = [f"{name}{i:02d}" for i in range(len(lines))]
        text = [f"{k} {line}\n" for k, line in zip(keys, lines)]
        shape = [f"{k} {len(line)}\n" for k, line in zip(keys, lines)]
        (data / name).write_text("".join(text), encoding="utf-8")
        (data / f"{name}_shape").write_text("".join(shape), encoding="utf-8")
    tokens = data / "tokens.txt"
    tokens.write_text("\n".join(CHARS) + "\n", encoding="utf-8")

    def run(folder, plan=None, **settings):
        torch.set_num_threads(1)  # a forked child must not meet the parent's thread pool
        lm_conf = dict(unit=12, nlayers=1, dropout_rate=0.2)
        lm_conf.update(settings.pop("lm_conf", {}))
        if plan is not None:
            lm_conf["plan"] = copy.deepcopy(plan)
        values = dict(
            lm="mpq_seq_rnn",
            model="mpq_lm",
            optim="adam",
            optim_conf=dict(lr=0.01),
            batch_type="unsorted",
            batch_size=8,
            max_epoch=3,
            num_workers=0,
            seed=1,
            token_type="char",
            use_tensorboard=False,
            use_matplotlib=False,
            keep_nbest_models=2,
            best_model_criterion=[["valid", "loss", "min"]],
            lm_conf=lm_conf,
        )
        values.update(settings)
        config = data / f"config{os.getpid()}.yaml"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        host.LMTask.main(
            cmd=["--config", str(config), "--output_dir", str(folder), "--ngpu", "0"]
            + ["--token_list", str(tokens), "--resume", "true"]
            + ["--train_data_path_and_name_and_type", f"{data}/train,text,text"]
            + ["--valid_data_path_and_name_and_type", f"{data}/valid,text,text"]
            + ["--train_shape_file", f"{data}/train_shape"]
            + ["--valid_shape_file", f"{data}/valid_shape"]
        )
        return folder

    return run


@pytest.fixture(scope="module")
def fp(train, tmp_path_factory):
    """Checkpoint of a small fp LM trained by the host's own classes."""
    folder = train(tmp_path_factory.mktemp("fp") / "lm", lm="seq_rnn", model="lm", max_epoch=4)
    return folder / "valid.loss.best.pth"


@pytest.fixture(scope="module")
def whole(train, fp, tmp_path_factory):
    """One uninterrupted run with a plan; read only."""
    return train(tmp_path_factory.mktemp("whole") / "lm", PLAN, init_param=[str(fp)], **ADMM)


def load(path):
    return torch.load(path, map_location="cpu")


def checkpoint(folder):
    try:
        return torch.load(folder / "checkpoint.pth", weights_only=False)
    except TypeError:  # torch 1.13 pickles without the argument
        return torch.load(folder / "checkpoint.pth")


def lm_of(host, folder, name):
    model, _ = host.LMTask.build_model_from_file(str(folder / "config.yaml"), str(folder / name))
    return model.lm


def assert_on_grid(lm):
    for cluster in find_clusters(lm):
        spec, mats = lm.plan.clusters[cluster.name], get_mats(lm, cluster)
        for mat, value in zip(mats, project_cluster(mats, spec).values):
            torch.testing.assert_close(mat, value, rtol=1e-6, atol=0)


def assert_same(a, b, **tolerance):
    a, b = load(a), load(b)
    assert a.keys() == b.keys()
    for key in a:
        if tolerance:
            torch.testing.assert_close(a[key], b[key], rtol=0, **tolerance)
        else:
            assert torch.equal(a[key], b[key]), key


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


EXTRA = dict(ADMM, mpq_extragradient=True, mpq_eta1=0.02, mpq_distill=0.5)


@pytest.mark.parametrize("options", [ADMM, dict(EXTRA, accum_grad=2)], ids=["plain", "extra"])
def test_resumed_run_ends_bit_identical(train, fp, whole, tmp_path, monkeypatch, options):
    """Interrupted in the second epoch, i.e. after one finished epoch, and started again."""
    from espnet_mpq.hosts.espnet.trainer import MpqTrainer

    if options is ADMM:
        right = whole
    else:
        right = train(tmp_path / "right", PLAN, init_param=[str(fp)], **options)
    stock = MpqTrainer.validate_one_epoch.__func__
    seen = []

    def interrupted(cls, **arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return stock(cls, **arguments)

    monkeypatch.setattr(MpqTrainer, "validate_one_epoch", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "lm", PLAN, init_param=[str(fp)], **options)
    monkeypatch.undo()
    train(tmp_path / "lm", PLAN, init_param=[str(fp)], **options)
    for name in ("3epoch.pth", "valid.loss.ave_2best.pth"):
        assert_same(tmp_path / "lm" / name, right / name)


def in_child(function):
    """Run ``function`` in a forked child (the host is imported already); its exit code."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(240)
    if child.is_alive():
        child.kill()
        pytest.fail("child process hangs")
    return child.exitcode


@pytest.mark.parametrize("moment", ["in the epoch", "in checkpoint.pth", "before 2epoch.pth"])
def test_killed_run_goes_on_from_the_last_checkpoint(train, fp, whole, tmp_path, moment):
    def killed():
        from espnet_mpq.training.admm import AdmmController

        def kill():
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "in the epoch":
            after = AdmmController._after_step

            def counted(self):
                after(self)
                if self.n_updates == 7:
                    kill()

            AdmmController._after_step = counted
        else:
            save = torch.save

            def cut(value, path, *args, **kwargs):
                if moment == "before 2epoch.pth" and str(path).endswith("2epoch.pth"):
                    kill()
                save(value, path, *args, **kwargs)
                if moment == "in checkpoint.pth" and "optimizers" in value:
                    if len(value["reporter"]["stats"]) == 2:
                        os.truncate(path, os.path.getsize(path) // 2)
                        kill()

            torch.save = cut
        train(tmp_path / "lm", PLAN, init_param=[str(fp)], **ADMM)

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "lm" / "3epoch.pth").exists()
    train(tmp_path / "lm", PLAN, init_param=[str(fp)], **ADMM)
    assert_same(tmp_path / "lm" / "3epoch.pth", whole / "3epoch.pth")
    for link in ("valid.loss.best.pth", "latest.pth"):
        assert os.readlink(tmp_path / "lm" / link) == os.readlink(whole / link)


def test_damaged_checkpoint_without_a_previous_one_is_one_clear_error(train, fp, whole, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(whole, folder, symlinks=True)
    os.truncate(folder / "checkpoint.pth", 1000)
    with pytest.raises(FormatError, match="checkpoint.pth is damaged"):
        train(folder, PLAN, init_param=[str(fp)], **ADMM)


def test_other_plan_or_fp_checkpoint_in_the_folder_is_refused(train, fp, whole, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(whole, folder, symlinks=True)
    other = copy.deepcopy(PLAN)
    other["clusters"]["output"]["bits"] = 8
    with pytest.raises(MismatchError, match="another plan"):
        train(folder, other, init_param=[str(fp)], **dict(ADMM, max_epoch=5))
    with pytest.raises(MismatchError, match="no ADMM state"):
        shutil.copy(fp.parent / "checkpoint.pth", folder / "checkpoint.pth")
        train(folder, PLAN, init_param=[str(fp)], **dict(ADMM, max_epoch=5))


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "extragradient"])
def test_two_processes_equal_one_on_the_same_global_batch(train, fp, tmp_path, extra):
    options = dict(
        EXTRA if extra else ADMM, accum_grad=2, max_epoch=2, lm_conf=dict(dropout_rate=0.0)
    )
    one = train(tmp_path / "one", PLAN, init_param=[str(fp)], **options)

    def rank(number):
        def work():
            os.environ["MASTER_ADDR"] = "localhost"
            train(
                tmp_path / "two",
                PLAN,
                init_param=[str(fp)],
                **options,
                multiprocessing_distributed=False,
                dist_world_size=2,
                dist_rank=number,
                local_rank=number,
                dist_backend="gloo",
                dist_init_method=f"file://{tmp_path}/meeting",
            )

        return work

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank(number)) for number in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    assert_same(one / "2epoch.pth", tmp_path / "two" / "2epoch.pth", atol=1e-5)
    a, b = (checkpoint(f)["reporter"]["stats"][2]["valid"] for f in (one, tmp_path / "two"))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert a["admm_primal"] == pytest.approx(b["admm_primal"], abs=1e-5)


def test_extragradient_replays_the_window_of_the_host(train, fp, tmp_path, monkeypatch):
    """With eta1 -> 0 the second gradient is the first: any other batch or mask would show."""
    pairs = []

    from espnet_mpq.training.admm import AdmmController

    def compare(self):
        first = [p.grad.clone() for p in self.lm.parameters()]
        for p in self.lm.parameters():
            p.grad.zero_()
        self.gradient_at()
        pairs.append([(a, p.grad.clone()) for a, p in zip(first, self.lm.parameters())])
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
        lm, lm.plan, optimizer, AdmmOptions(dual_period_updates=2, finish_epochs=1)
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
