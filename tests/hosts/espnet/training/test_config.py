"""Training options for ADMM: what is inherited, what is changed, comments that YAML ignores."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from espnet_mpq.clusters import find_clusters
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.plan import Plan, uniform_plan


@pytest.fixture
def exp(host, fp_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    return load_fp_lm(fp_exp.path)


@pytest.fixture
def plan(exp):
    return uniform_plan(find_clusters(exp.lm), 4)


def changed(exp, **changes):
    args = type(exp.args)(**{**vars(exp.args), **changes})
    return dataclasses.replace(exp, args=args)


def test_options_of_the_fp_lm_are_kept_and_softened(exp, plan):
    from espnet_mpq.hosts.espnet.training.config import train_settings

    exp = changed(
        exp,
        batch_type="numel",
        batch_bins=12345,
        accum_grad=2,
        optim="adam",
        optim_conf={"lr": 0.004, "weight_decay": 0.1, "foreach": None, "amsgrad": False},
        scheduler="warmuplr",
        scheduler_conf={"warmup_steps": 25000},
        max_epoch=15,
        patience=3,
        bpemodel="data/bpe.model",
    )
    settings = train_settings(exp, plan)
    assert settings["batch_type"] == "numel" and settings["batch_bins"] == 12345
    assert settings["accum_grad"] == 2 and settings["bpemodel"] == "data/bpe.model"
    assert settings["optim_conf"] == {"lr": 0.002, "weight_decay": 0.1}
    assert settings["max_epoch"] == 8
    # A schedule from scratch, early stopping, paths of data: not for fine-tuning.
    for key in ("scheduler", "scheduler_conf", "patience", "token_list", "output_dir"):
        assert key not in settings
    assert exp.args.lm_conf == {"unit": 16, "nlayers": 2}


@pytest.mark.parametrize(
    "optim, conf, scheduler, scheduler_conf, expected",
    [
        ("adamw", {"lr": 0.002, "weight_decay": 0.0}, None, {}, {"lr": 0.001, "weight_decay": 0.0}),
        ("sgd", {"lr": 20}, None, {}, {"lr": 10.0}),
        # 1 / sqrt(256 * 400) = 1/320 at the end of the warm-up
        ("adam", {"lr": 1.0}, "noamlr", {"model_size": 256, "warmup_steps": 400}, {"lr": 1 / 640}),
        ("adam", {"lr": 1e-4}, "onecyclelr", {"max_lr": 0.004}, {"lr": 0.002}),
        ("adam", {"lr": 0.1}, None, {}, {"lr": 0.001}),
        ("adadelta", {"rho": 0.9}, None, {}, {"rho": 0.9}),
    ],
)
def test_learning_rate_is_half_the_peak(
    exp, plan, optim, conf, scheduler, scheduler_conf, expected
):
    from espnet_mpq.hosts.espnet.training.config import train_settings

    exp = changed(
        exp, optim=optim, optim_conf=conf, scheduler=scheduler, scheduler_conf=scheduler_conf
    )
    assert train_settings(exp, plan)["optim_conf"] == pytest.approx(expected)


def test_missing_reporting_packages_are_switched_off(exp, plan, monkeypatch):
    from espnet_mpq.hosts.espnet.training import config as train_config

    real = train_config.importlib.util.find_spec
    monkeypatch.setattr(
        train_config.importlib.util,
        "find_spec",
        lambda name, *a: None if name == "tensorboard" else real(name, *a),
    )
    exp = changed(exp, use_tensorboard=True, use_matplotlib=True)
    settings = train_config.train_settings(exp, plan)
    assert settings["use_tensorboard"] is False and settings["use_matplotlib"] is True
    user = {"use_tensorboard": True}
    assert train_config.train_settings(exp, plan, user)["use_tensorboard"] is True


@pytest.mark.parametrize("fp_epochs, epochs, finish", [(1, 5, 1), (40, 10, 1), (13, 7, 1)])
def test_epochs(exp, plan, fp_epochs, epochs, finish):
    from espnet_mpq.hosts.espnet.training.config import train_settings

    settings = train_settings(changed(exp, max_epoch=fp_epochs), plan)
    assert (settings["max_epoch"], settings["mpq_finish_epochs"]) == (epochs, finish)


def test_finish_epochs_follow_the_user_s_epochs(exp, plan):
    from espnet_mpq.hosts.espnet.training.config import train_settings

    settings = train_settings(exp, plan, {"max_epoch": 1})
    assert settings["mpq_finish_epochs"] <= 1
    settings = train_settings(exp, plan, {"max_epoch": 9, "mpq_finish_epochs": 4})
    assert settings["mpq_finish_epochs"] == 4


def test_yaml_has_comments_and_the_same_values(exp, plan):
    from espnet_mpq.hosts.espnet.training.config import to_yaml, train_settings

    settings = train_settings(exp, plan, {"best_model_criterion": [("valid", "loss", "min")]})
    text = to_yaml(settings, "line one\nline two")
    assert text.startswith("# line one\n# line two\n")
    value = yaml.safe_load(text)
    assert Plan.from_dict(value["lm_conf"].pop("plan")) == plan
    settings["lm_conf"].pop("plan")
    assert value == {**settings, "best_model_criterion": [["valid", "loss", "min"]]}
    # A number such as 1e-3 must not come back as a string.
    assert isinstance(value["mpq_gamma"], float)


def test_other_lms_are_refused(exp, plan):
    from espnet_mpq.hosts.espnet.training.config import train_settings

    with pytest.raises(InputError, match="found lm: transformer_opt; expected lm: one of seq_rnn"):
        train_settings(changed(exp, lm="transformer_opt"), plan)
    for lm in ("transformer", "mpq_transformer"):
        with pytest.raises(InputError, match=f"found lm: {lm}; expected mpq_seq_rnn"):
            train_settings(exp, plan, {"lm": lm})


@pytest.mark.parametrize("lm", ["transformer", "mpq_transformer"])
def test_transformers_train_as_mpq_transformer(exp, plan, lm):
    """The LM stays as it is; of lm_conf only the dropout rates may change."""
    from espnet_mpq.hosts.espnet.training.config import train_settings

    conf = {"att_unit": 8, "dropout_rate": 0.1, "attention_dropout_rate": 0.2}
    exp = changed(exp, lm=lm, lm_conf=conf)
    more = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "positional_dropout_rate": 0.3}
    settings = train_settings(exp, plan, {"lm": "transformer", "lm_conf": more})
    assert settings["lm"] == "mpq_transformer"
    assert settings["lm_conf"] == {"att_unit": 8, **more, "plan": plan.inline()}
    with pytest.raises(MismatchError, match="lm_conf.att_unit: found 16; expected 8"):
        train_settings(exp, plan, {"lm_conf": {"att_unit": 16}})


def test_the_command_line_of_mpq_is_not_read_as_the_hosts(exp, plan, tmp_path, monkeypatch):
    """`mpq plan --config FILE`: the host's parser must not open FILE as options of lm_train."""
    from espnet_mpq.hosts.espnet.training.config import train_settings

    options = tmp_path / "plan.yaml"
    options.write_text("budget: 2.0\n")
    monkeypatch.setattr("sys.argv", ["mpq", "plan", "--config", str(options)])
    assert train_settings(exp, plan, {"max_epoch": 3})["max_epoch"] == 3
    with pytest.raises(InputError, match="unknown training option 'ngpu'"):
        train_settings(exp, plan, {"ngpu": 1})  # given on the command line of lm_train


@pytest.mark.parametrize("option, value", [("lm_conf", 3), ("lm_conf", [1]), ("optim_conf", "x")])
def test_groups_of_options_that_are_none_are_refused(exp, plan, option, value):
    from espnet_mpq.hosts.espnet.training.config import train_settings
    from espnet_mpq.hosts.espnet.training.nas_config import nas_settings
    from espnet_mpq.search.nas_options import NasOptions

    for settings in (
        lambda user: train_settings(exp, plan, user),
        lambda user: nas_settings(exp, NasOptions(budget=30.0), 2, user),
    ):
        with pytest.raises(InputError) as caught:
            settings({option: value})
        message = f"training option {option}: found {value!r}; expected keys and values"
        assert str(caught.value) == message
