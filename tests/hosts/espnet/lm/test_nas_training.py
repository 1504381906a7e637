"""Super-networks in the host's trainer: budgets met, resumed runs, configurations that build."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from lm_runs import assert_same, checkpoint, load
from real_lms import read_sentences, train_host_lm, word_list

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.training.nas import STATE_KEY

LMS = {
    "seq_rnn": dict(unit=12, nlayers=1, dropout_rate=0.0),
    "transformer": dict(embed_unit=12, att_unit=12, head=2, unit=24, layer=1, dropout_rate=0.0),
}
# The header weighs more than the codes of such LMs: budgets in bytes, between 2 and 4 bits.
N_TOKENS = 60
FAST = dict(lr=0.3, temperature=1.0, final_temperature=0.1)


@pytest.fixture(scope="session")
def train(host, tiny_text):
    """train(folder, **settings): the host's lm_train on PTB sentences where they are staged."""
    root = os.environ.get("MPQ_DATA_ROOT")
    text = read_sentences(Path(root) / "ptb" / "ptb.valid.txt.gz", 2500) if root else tiny_text
    tokens = word_list(text, N_TOKENS)

    def run(folder, lm_conf, **settings):
        torch.set_num_threads(1)  # a forked child must not meet the parent's thread pool
        values = {"optim_conf": {"lr": 0.01}, "batch_tokens": 200, "seed": 1, **settings}
        return train_host_lm(folder, text[20:], text[:20], tokens, lm_conf, **values)

    return run


@pytest.fixture(scope="session")
def fps(train, tmp_path_factory):
    """Checkpoints of small fp LMs by kind, trained by the host."""
    folder = tmp_path_factory.mktemp("fps")
    return {
        lm: train(folder / lm, conf, lm=lm, max_epoch=3) / "3epoch.pth" for lm, conf in LMS.items()
    }


@pytest.fixture
def search(train, fps):
    """search(folder, lm, nas options, **settings): the host's lm_train of a super-network."""

    def run(folder, lm="seq_rnn", nas=None, **settings):
        conf = dict(LMS[lm], nas={**FAST, **(nas or {})})
        values = dict(
            lm=f"mpq_nas_{lm}",
            init_param=[str(fps[lm])],
            best_model_criterion=[["valid", "nas_loss", "min"]],
            max_epoch=5,
            num_iters_per_epoch=12,
        )
        return train(folder, conf, **{**values, **settings})

    return run


def budget_of(host, lm, low=2, high=4):
    """Bytes half way between two uniform bit-widths."""
    lm_class = host.lm_choices.get_class(f"mpq_nas_{lm}")
    nas = lm_class(vocab_size=N_TOKENS, **LMS[lm], nas=dict(budget_bytes=10**9)).nas
    sizes = [nas.choice_n_bytes(dict.fromkeys(nas.names, b)) for b in (low, high)]
    return sum(sizes) // 2


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("lm", LMS)
def test_the_budget_is_met_and_used(host, search, fps, tmp_path, lm, seed):
    budget = budget_of(host, lm)
    folder = search(tmp_path / "lm", lm, dict(budget_bytes=budget), seed=seed)
    stats = {e: s["valid"] for e, s in checkpoint(folder)["reporter"]["stats"].items()}
    last = stats[5]
    assert last["nas_n_bytes"] <= budget == last["nas_budget_n_bytes"]
    assert last["nas_loss"] == last["loss"] < 100.0
    # The budget is used: all clusters at 2 bits would be smaller by more than this.
    spare = (budget - last["nas_n_bytes"]) / (budget - budget_of(host, lm, 2, 2))
    assert spare < 0.9
    temperatures = [stats[e]["nas_temperature"] for e in range(1, 6)]
    assert temperatures == pytest.approx([0.1 ** (k / 4) for k in range(5)])
    assert last["nas_entropy"] < stats[1]["nas_entropy"]
    best = load(folder / "valid.nas_loss.best.pth")
    weights = load(fps[lm])
    assert set(best) == {*weights, "lm.nas.logits"}
    assert all(torch.equal(best[name], weights[name]) for name in weights)  # frozen
    assert float(best["lm.nas.logits"].abs().max()) > 0.1


def test_an_epoch_over_the_budget_is_not_the_best_one(host, search, tmp_path):
    budget = budget_of(host, "seq_rnn", 1, 2)
    # Nearly no penalty: the loss pulls to more bits, above the budget.
    nas = dict(budget_bytes=budget, rho=1e-9, multiplier_rate=1e-9)
    folder = search(tmp_path / "lm", nas=nas, max_epoch=2)
    stats = checkpoint(folder)["reporter"]["stats"]
    assert stats[2]["valid"]["nas_n_bytes"] > budget
    assert stats[2]["valid"]["nas_loss"] > 1000.0 > stats[2]["valid"]["loss"]


@pytest.mark.parametrize("phase", ["weights", "joint"])
def test_the_other_phases_train_the_weights(host, search, fps, tmp_path, phase):
    nas = dict(budget_bytes=budget_of(host, "seq_rnn"), phase=phase, refresh_updates=5)
    criterion = [["valid", "loss", "min"]]
    folder = search(tmp_path / "lm", nas=nas, max_epoch=2, best_model_criterion=criterion)
    first, last = load(fps["seq_rnn"]), load(folder / "2epoch.pth")
    assert all(not torch.equal(first[name], last[name]) for name in first)
    assert bool((last["lm.nas.logits"] != 0).any()) is (phase == "joint")
    stats = checkpoint(folder)["reporter"]["stats"]
    assert stats[2]["train"]["loss"] < stats[1]["train"]["loss"]


@pytest.mark.parametrize("phase", ["architecture", "joint"])
def test_a_killed_run_ends_as_if_it_had_not_been(host, search, tmp_path, phase):
    nas = dict(budget_bytes=budget_of(host, "seq_rnn"), phase=phase, refresh_updates=5)
    options = dict(nas=nas, max_epoch=3, best_model_criterion=[["valid", "loss", "min"]])
    right = search(tmp_path / "right", **options)

    def killed():
        from espnet_mpq.training.nas import NasController

        after = NasController._after_step

        def counted(self):
            after(self)
            if self.n_updates == 30:  # in the third epoch
                os.kill(os.getpid(), signal.SIGKILL)

        NasController._after_step = counted
        search(tmp_path / "lm", **options)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(240)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "lm" / "exp" / "3epoch.pth").exists()
    search(tmp_path / "lm", **options)
    resumed = tmp_path / "lm" / "exp"
    assert_same(resumed / "3epoch.pth", right / "3epoch.pth")
    states = [checkpoint(f)["optimizers"][0][STATE_KEY] for f in (resumed, right)]
    assert states[0]["n_updates"] == 36
    assert states[0]["multiplier"] == states[1]["multiplier"]


def test_other_options_in_the_same_folder_are_refused(host, search, tmp_path):
    budget = budget_of(host, "seq_rnn")
    folder = search(tmp_path / "lm", nas=dict(budget_bytes=budget), max_epoch=1)
    with pytest.raises(MismatchError, match="other options"):
        search(folder.parent, nas=dict(budget_bytes=budget, lr=0.2), max_epoch=2)
    with pytest.raises(InputError, match="mpq_distill"):
        search(tmp_path / "other", nas=dict(budget_bytes=budget), mpq_distill=0.5)


@pytest.mark.parametrize("lm", LMS)
def test_configurations_build_in_a_dry_run(host, make_lm_exp, tmp_path, lm):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.hosts.espnet.lm.nas_config import nas_settings
    from espnet_mpq.hosts.espnet.lm.train_config import to_yaml
    from espnet_mpq.search.nas_options import NasOptions

    fp = make_lm_exp(tmp_path / "fp", lm=lm, lm_conf=LMS[lm], n_steps=1)
    exp = load_fp_lm(fp.path)
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("\n".join(fp.token_list) + "\n", encoding="utf-8")
    for phase in ("weights", "architecture", "joint"):
        options = NasOptions(budget=100.0, phase=phase)
        config = tmp_path / f"{phase}.yaml"
        config.write_text(to_yaml(nas_settings(exp, options, 7), "a test"), encoding="utf-8")
        out = tmp_path / phase
        host.LMTask.main(
            cmd=["--config", str(config), "--iterator_type", "none", "--dry_run", "true"]
            + ["--output_dir", str(out), "--token_list", str(tokens)]
        )
        built = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
        assert built["lm"] == f"mpq_nas_{lm}" and built["lm_conf"]["nas"]["phase"] == phase
        assert built["max_epoch"] == 7
        if phase == "architecture":
            assert {v for k, v in built["lm_conf"].items() if "dropout" in k} == {0.0}
