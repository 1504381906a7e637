"""Opening LM experiments: the right weights, and one clear error for each wrong folder."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from espnet_mpq.errors import InputError, MismatchError, PlanError


@pytest.fixture
def exp_copy(fp_exp, tmp_path):
    return shutil.copytree(fp_exp.path, tmp_path / "lm_copy")


@pytest.fixture
def load(host):
    from espnet_mpq.hosts.espnet.experiment import opened as experiment

    return experiment.load_fp_lm


def test_opens_an_experiment_in_eval_mode(load, fp_exp):
    exp = load(fp_exp.path)
    saved = torch.load(fp_exp.checkpoint)
    for name, value in exp.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert not exp.model.training and exp.module is exp.model.lm
    assert exp.checkpoint == fp_exp.checkpoint and exp.config == fp_exp.config
    assert list(exp.vocabulary.tokens) == fp_exp.token_list
    last = len(fp_exp.token_list) - 1
    assert exp.vocabulary.special_ids == {"blank": 0, "unk": 1, "sos": last, "eos": last}


def test_chooses_the_checkpoint(load, exp_copy):
    best = exp_copy / "valid.loss.best.pth"
    shutil.copy(best, exp_copy / "valid.loss.ave.pth")
    best.rename(exp_copy / "5epoch.pth")
    assert load(exp_copy).checkpoint.name == "valid.loss.ave.pth"
    assert load(exp_copy, "5epoch.pth").checkpoint.name == "5epoch.pth"
    assert load(exp_copy, str(exp_copy / "5epoch.pth")).checkpoint.name == "5epoch.pth"
    (exp_copy / "valid.loss.ave.pth").unlink()
    assert load(exp_copy).checkpoint.name == "5epoch.pth"
    shutil.copy(exp_copy / "5epoch.pth", exp_copy / "4epoch.pth")
    with pytest.raises(InputError, match="4epoch.pth, 5epoch.pth.*--lm_file"):
        load(exp_copy)


def test_names_what_is_missing(load, exp_copy, tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no .*7epoch.pth.*found .*valid.loss.best.pth"):
        load(exp_copy, "7epoch.pth")
    (exp_copy / "config.yaml").unlink()
    with pytest.raises(InputError, match="no config.yaml.*valid.loss.best.pth"):
        load(exp_copy)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lm: [", "cannot be read as YAML"),
        ("a string", "no lm, lm_conf, token_list"),
        ("lm: seq_rnn\nlm_conf: {}\n", "no token_list"),
    ],
)
def test_damaged_config(load, exp_copy, text, message):
    (exp_copy / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load(exp_copy)


def change_config(folder, **settings):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config.update(settings)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def test_config_of_another_lm(load, exp_copy):
    change_config(exp_copy, lm="seq_rn")
    with pytest.raises(InputError, match="did you mean 'seq_rnn'"):
        load(exp_copy)
    change_config(exp_copy, lm="seq_rnn", lm_conf={"unit": 16, "hidden": 3})
    with pytest.raises(InputError, match="unknown key lm_conf.hidden: did you mean 'nhid'"):
        load(exp_copy)
    change_config(exp_copy, lm_conf={"unit": 24, "nlayers": 2})
    with pytest.raises(
        MismatchError, match=r"encoder.weight: found \(31, 16\); expected \(31, 24\)"
    ):
        load(exp_copy)
    change_config(exp_copy, lm_conf={"unit": 16, "nlayers": 3})
    with pytest.raises(MismatchError, match="missing .*rnn.weight_ih_l2"):
        load(exp_copy)
    change_config(exp_copy, lm_conf={"unit": 16, "nlayers": 1})
    with pytest.raises(MismatchError, match="unknown .*rnn.weight_ih_l1"):
        load(exp_copy)


def test_foreign_and_damaged_checkpoints(load, exp_copy):
    path = exp_copy / "valid.loss.best.pth"
    whole = path.read_bytes()
    torch.save({"encoder.embed.weight": torch.zeros(3)}, path)
    with pytest.raises(MismatchError, match="no weight of this LM: found encoder.embed.weight"):
        load(exp_copy)
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as a checkpoint"):
            load(exp_copy)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["lm_conf"].update(rnn_type="foo"), "unknown rnn_type: found 'foo'"),
        (lambda c: c.update(init="foo"), "cannot be built: found ValueError: Unknown init"),
        (lambda c: c["lm_conf"].update(unit="16"), "bad unit: found '16'"),
        (lambda c: c.update(model="lm_multitusk"), "model: lm_multitusk; did you mean"),
    ],
)
def test_values_that_the_host_cannot_build(load, exp_copy, change, message):
    path = exp_copy / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(exp_copy)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_bad_plan_in_the_config_stays_a_plan_error(load, exp_copy):
    path = exp_copy / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["lm"] = "mpq_seq_rnn"
    settings["lm_conf"]["plan"] = {"clusters": {"embedding": {"bits": 2.0}}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(PlanError, match="2.0"):
        load(exp_copy)


def test_multitask_model_does_not_end_in_a_traceback(load, exp_copy):
    path = exp_copy / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["model"] = "lm_multitask"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(InputError):
        load(exp_copy)
