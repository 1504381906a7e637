"""Training options for ADMM: what is inherited, what is changed, comments that YAML ignores."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from found import find_clusters

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.plan import Plan, uniform_plan


@pytest.fixture
def exp(host, fp_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    return load_fp_lm(fp_exp.path)


@pytest.fixture
def plan(exp):
    return uniform_plan(find_clusters(exp.module), 4)


def changed(exp, **changes):
    args = type(exp.args)(**{**vars(exp.args), **changes})
    return dataclasses.replace(exp, args=args)


def test_options_of_the_fp_lm_are_kept_and_softened(exp, plan):
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

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
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    exp = changed(
        exp, optim=optim, optim_conf=conf, scheduler=scheduler, scheduler_conf=scheduler_conf
    )
    assert train_settings(exp, plan)["optim_conf"] == pytest.approx(expected)


def test_missing_reporting_packages_are_switched_off(exp, plan, monkeypatch):
    from espnet_mpq.hosts.espnet.lm import train_config

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
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    settings = train_settings(changed(exp, max_epoch=fp_epochs), plan)
    assert (settings["max_epoch"], settings["mpq_finish_epochs"]) == (epochs, finish)


def test_finish_epochs_follow_the_user_s_epochs(exp, plan):
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    settings = train_settings(exp, plan, {"max_epoch": 1})
    assert settings["mpq_finish_epochs"] <= 1
    settings = train_settings(exp, plan, {"max_epoch": 9, "mpq_finish_epochs": 4})
    assert settings["mpq_finish_epochs"] == 4


def test_yaml_has_comments_and_the_same_values(exp, plan):
    from espnet_mpq.hosts.espnet.lm.train_config import to_yaml, train_settings

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
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    with pytest.raises(InputError, match="found lm: transformer_opt; expected lm: one of seq_rnn"):
        train_settings(changed(exp, lm="transformer_opt"), plan)
    for lm in ("transformer", "mpq_transformer"):
        with pytest.raises(InputError, match=f"found lm: {lm}; expected mpq_seq_rnn"):
            train_settings(exp, plan, {"lm": lm})


@pytest.mark.parametrize("lm", ["transformer", "mpq_transformer"])
def test_transformers_train_as_mpq_transformer(exp, plan, lm):
    """The LM stays as it is; of lm_conf only the dropout rates may change."""
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

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
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    options = tmp_path / "plan.yaml"
    options.write_text("budget: 2.0\n")
    monkeypatch.setattr("sys.argv", ["mpq", "plan", "--config", str(options)])
    assert train_settings(exp, plan, {"max_epoch": 3})["max_epoch"] == 3
    with pytest.raises(InputError, match="unknown training option 'ngpu'"):
        train_settings(exp, plan, {"ngpu": 1})  # given on the command line of lm_train


@pytest.mark.parametrize("option, value", [("lm_conf", 3), ("lm_conf", [1]), ("optim_conf", "x")])
def test_groups_of_options_that_are_none_are_refused(exp, plan, option, value):
    from espnet_mpq.hosts.espnet.lm.nas_config import nas_settings
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings
    from espnet_mpq.search.nas_options import NasOptions

    for settings in (
        lambda user: train_settings(exp, plan, user),
        lambda user: nas_settings(exp, NasOptions(budget=30.0), 2, user),
    ):
        with pytest.raises(InputError) as caught:
            settings({option: value})
        message = f"training option {option}: found {value!r}; expected keys and values"
        assert str(caught.value) == message


@pytest.fixture
def refused(exp, plan):
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    def check(text, message):
        with pytest.raises(InputError, match=message):
            train_settings(exp, plan, yaml.safe_load(text))

    return check


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim_conf: {lr: 1e-3}", r"optim_conf.lr: found '1e-3'; .*1e-3 is text: write 0.001"),
        ("optim_conf: {lr: 1.0e3}", r"1.0e3 is text: write 1000.0"),
        ("optim_conf: {lr: 1e-10}", r"1e-10 is text: write 1.0e-10"),
        ("optim_conf: {lr: '.5'}", r"optim_conf.lr: found '.5'.*write 0.5"),
        ("optim_conf: {betas: [0.9, 1e-1]}", r"optim_conf.betas: found '1e-1'.*write 0.1"),
        ("optim: adam\noptim_conf: {lr: -0.1}", r"optim_conf: found Invalid learning rate: -0.1"),
        ("optim: adam\noptim_conf: {lr: .nan}", "lr: found nan; expected a finite number"),
        ("optim: adam\noptim_conf: {lr: [0.1]}", r"lr: found \[0.1\]; expected a number"),
        ("optim: adam\noptim_conf: {lr: on}", "lr: found True; expected a number; YAML reads yes"),
        ("optim: adam\noptim_conf: {amsgrad: 1}", "amsgrad: found 1; expected true or false"),
        ("optim: adam\noptim_conf: {betas: 0.9}", "betas: found 0.9; expected a list of 2"),
        ("optim: adam\noptim_conf: {betas: [0.9, 2]}", "found Invalid beta parameter"),
        ("optim: adam\noptim_conf: {weight_deacy: 0}", "did you mean 'weight_decay'.*Adam"),
        ("optim: adamm", "optim: found 'adamm'; did you mean 'adam"),
        ("optim: off", "optim: found False; expected one of adam"),
        ("scheduler: warmupl", "scheduler: found 'warmupl'; did you mean 'warmuplr'"),
        ("scheduler: warmuplr\nscheduler_conf: {warmup: 1}", "did you mean 'warmup_steps'"),
        ("scheduler: steplr", "scheduler_conf: found .*step_size"),
        ("scheduler: warmuplr\nscheduler_conf: {warmup_steps: 1e3}", "write 1000.0"),
        ("mpq_gamma: text", "mpq_gamma: found 'text'; expected a number"),
        ("mpq_gamma: -1", "gamma: found -1.*above 0"),
        ("mpq_gamma: .nan", "mpq_gamma: found nan"),
        ("mpq_gamma_schedule: grow", "gamma_schedule: found 'grow'; expected one of constant"),
        ("mpq_distill: 2", "mpq_distill: found 2; expected a weight in 0..1"),
        ("max_epoch: 4\nmpq_finish_epochs: 5", "at most max_epoch, which is 4"),
        ("mpq_extragradient: maybe", "found 'maybe'; expected true or false"),
        ("max_epoch: yes", "max_epoch: found True; expected a whole number; YAML reads yes"),
        ("max_epoch: 1.5", "max_epoch: found 1.5; expected a whole number"),
        ("max_epoch: 1e1", "max_epoch: found '1e1'.*is text: write 10.0"),
        ("max_epoch: [5]", r"max_epoch: found \[5\]; expected a whole number"),
        ("max_epoch: null", "max_epoch: found null; expected a whole number"),
        ("max_epoch: 0", "max_epoch: found 0; expected a whole number from 1"),
        ("accum_grad: 2021-01-01", "accum_grad: found datetime.date"),
        ("batch_type: nummel", "batch_type: found 'nummel'; did you mean 'numel'"),
        ("use_amp: 2", "use_amp: found 2; expected true or false"),
        ("token_type: no", "token_type: found False; expected one of bpe, char, word"),
        ("freeze_param: rnn", r"freeze_param: found 'rnn', one value; expected a list"),
        ("keep_nbest_models: [0]", "keep_nbest_models: found 0"),
        ("best_model_criterion: [[valid, loss, lowest]]", "train or valid"),
        ("best_model_criterion: [[valid, loss]]", "expected .valid, loss, min"),
        ("lm_conf: {dropout_rate: 2}", "dropout_rate: found 2; expected a number from 0"),
        ("lm_conf: {dropout_rate: 1e-1}", "dropout_rate: found '1e-1'.*write 0.1"),
        ("optim_conf: {1: 2}", "optim_conf.1: found 1; expected a name"),
    ],
)
def test_every_value_is_checked_at_the_start(refused, text, message):
    refused(text, message)


def test_values_as_the_hosts_parser_takes_them(exp, plan):
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    user = yaml.safe_load(
        "max_epoch: '6'\nmpq_gamma: 1e-3\ngrad_clip: .5\nbatch_bins: 1_000\nuse_amp: 'no'\n"
        "patience: none\nkeep_nbest_models: 3\noptim: Adam\noptim_conf: {lr: 1.0e-3}\n"
        "best_model_criterion: ['valid,loss,min']\nscheduler: null\ncleaner: null\n"
        "mpq_extragradient: off\nlm_conf: {dropout_rate: 0}\nmax_cache_size: 1GB\n"
    )
    settings = train_settings(exp, plan, user)
    wanted = dict(max_epoch=6, mpq_gamma=0.001, grad_clip=0.5, batch_bins=1000, use_amp=False)
    wanted.update(patience=None, keep_nbest_models=3, optim="adam", optim_conf={"lr": 0.001})
    wanted.update(best_model_criterion=[["valid", "loss", "min"]], mpq_extragradient=False)
    assert {key: settings[key] for key in wanted} == wanted
    assert all(type(settings[key]) is type(value) for key, value in wanted.items())


def test_an_inherited_optimizer_that_cannot_be_made_is_a_warning(exp, plan, caplog):
    from espnet_mpq.hosts.espnet.lm.train_config import train_settings

    exp = changed(exp, optim="fusedadam", optim_conf={})
    with caplog.at_level("WARNING", logger="espnet_mpq"):
        assert train_settings(exp, plan)["optim"] == "fusedadam"
    assert "optim: found 'fusedadam'" in caplog.text and "--train_config" in caplog.text
    with pytest.raises(InputError, match="fusedadam"):
        train_settings(exp, plan, {"optim_conf": {"lr": 0.1}})
