"""Registration: what it adds, what it leaves alone, packed files, errors about the host."""

from __future__ import annotations

import argparse
import copy
import shutil

import pytest
import torch
import yaml

import espnet_mpq
from espnet_mpq.errors import (
    CheckpointError,
    FormatError,
    HostError,
    InputError,
    MismatchError,
)


def train(host, folder, *options):
    """Train with the host's own entry point in this process; returns the epoch's weights."""
    tokens = folder.parent / "tokens.txt"
    host.LMTask.main(
        cmd=[
            *("--output_dir", str(folder), "--token_list", str(tokens), "--token_type", "char"),
            *("--use_tensorboard", "false", "--use_matplotlib", "false", "--num_workers", "0"),
            *("--ngpu", "0", "--max_epoch", "2", "--batch_type", "unsorted", "--batch_size", "8"),
            *("--train_data_path_and_name_and_type", f"{folder.parent}/text,text,text"),
            *("--valid_data_path_and_name_and_type", f"{folder.parent}/text,text,text"),
            *("--train_shape_file", str(folder.parent / "shape")),
            *("--valid_shape_file", str(folder.parent / "shape")),
            *("--optim", "adam", "--optim_conf", "lr=0.01", "--keep_nbest_models", "1"),
            *("--lm_conf", "unit=8", "--lm_conf", "nlayers=1", *options),
        ]
    )
    return torch.load(folder / "valid.loss.best.pth")


@pytest.fixture
def corpus(fp_exp, kaldi_text_file, tmp_path):
    (tmp_path / "tokens.txt").write_text("\n".join(fp_exp.token_list) + "\n", encoding="utf-8")
    shutil.copy(kaldi_text_file, tmp_path / "text")
    lines = kaldi_text_file.read_text(encoding="utf-8").splitlines()
    shapes = [f"{u} {len(t)}" for u, t in (line.split(maxsplit=1) for line in lines)]
    (tmp_path / "shape").write_text("\n".join(shapes) + "\n", encoding="utf-8")
    return tmp_path


def test_adds_our_choices_once(host):
    loader, trainer = host.LMTask.build_model_from_file, host.LMTask.trainer
    before = dict(host.lm_choices.classes), dict(host.model_choices.classes)
    espnet_mpq.register()
    assert (host.lm_choices.classes, host.model_choices.classes) == before
    assert host.LMTask.build_model_from_file == loader and host.LMTask.trainer is trainer
    assert {"mpq_seq_rnn", "mpq_packed_rnn", "seq_rnn", "transformer"} <= set(before[0])
    assert "mpq_lm" in before[1] and trainer.__name__ == "MpqTrainer"
    args = host.LMTask.get_parser().parse_args(["--output_dir", "x", "--token_list", "y"])
    assert (args.lm, args.model) == ("seq_rnn", "lm")


def test_our_choices_are_as_the_host_wants_them(host):
    from espnet2.lm.abs_model import AbsLM
    from espnet2.lm.espnet_model import ESPnetLanguageModel
    from espnet2.train.trainer import Trainer

    for choice, kind, choices in (
        ("mpq_seq_rnn", AbsLM, host.lm_choices),
        ("mpq_packed_rnn", AbsLM, host.lm_choices),
        ("mpq_lm", ESPnetLanguageModel, host.model_choices),
    ):
        assert choice == choice.lower() and issubclass(choices.get_class(choice), kind)
    assert issubclass(host.LMTask.trainer, Trainer)


def test_other_files_are_the_hosts_own_business(host, fp_exp):
    original = host.LMTask.build_model_from_file.mpq_original
    ours, args = host.LMTask.build_model_from_file(fp_exp.config, fp_exp.checkpoint)
    theirs, _ = original(fp_exp.config, fp_exp.checkpoint)
    assert type(ours.lm) is type(theirs.lm) and ours.training == theirs.training
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    assert isinstance(args, argparse.Namespace)

    class Task(host.LMTask):
        @classmethod
        def build_model(cls, args):
            model = super().build_model(args)
            model.from_subclass = True
            return model

    assert Task.build_model_from_file(fp_exp.config, fp_exp.checkpoint)[0].from_subclass


def test_stock_training_is_unchanged(host, corpus, monkeypatch):
    """The same run with the host's trainer and with ours, no mpq option: equal bit for bit."""
    from espnet2.train.trainer import Trainer

    ours = train(host, corpus / "ours")
    monkeypatch.setattr(host.LMTask, "trainer", Trainer)
    theirs = train(host, corpus / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name


def test_deepspeed_gets_the_hosts_own_trainer(host, monkeypatch):
    """The host compares LMTask.trainer with its own there and refuses any other."""
    from espnet2.train.trainer import Trainer

    from espnet_mpq.hosts.espnet import registry

    class Task(host.LMTask):
        def main_worker(cls, args):
            return cls.trainer

        main_worker = registry._wrap_worker(classmethod(main_worker).__get__(None, host.LMTask))

    args = argparse.Namespace(use_deepspeed=False, lm="seq_rnn")
    assert Task.main_worker(args) is host.LMTask.trainer is not Trainer
    args.use_deepspeed = True
    assert Task.main_worker(args) is Trainer
    assert Task.trainer is host.LMTask.trainer, "the next LM of this process needs ours"
    args.lm = "mpq_seq_rnn"
    with pytest.raises(InputError, match="cannot be trained with deepspeed"):
        Task.main_worker(args)
    assert host.LMTask.trainer is not Trainer

    def failing(cls, args):
        cls.trainer = object
        raise RuntimeError("no deepspeed here")

    Task.trainer = ours = host.LMTask.trainer
    Task.main_worker = registry._wrap_worker(classmethod(failing).__get__(None, Task))
    args.lm = "seq_rnn"
    with pytest.raises(RuntimeError, match="no deepspeed here"):
        Task.main_worker(args)
    assert Task.trainer is ours


def test_init_param_from_an_fp_checkpoint(host, fp_exp, corpus):
    """An fp checkpoint of the host starts mpq_seq_rnn with --init_param and nothing else."""
    options = ["--lm", "mpq_seq_rnn", "--init_param", str(fp_exp.checkpoint)]
    options += ["--lm_conf", "unit=16", "--lm_conf", "nlayers=2", "--optim_conf", "lr=0.0"]
    got = train(host, corpus / "init", *options)
    expected = torch.load(fp_exp.checkpoint)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    config = yaml.safe_load((corpus / "init" / "config.yaml").read_text(encoding="utf-8"))
    assert config["lm"] == "mpq_seq_rnn"


def test_checkpoint_without_a_matching_key_is_refused(host, fp_exp, tmp_path):
    """The host loads with strict=False; our classes must not take that silently."""
    settings = copy.deepcopy(yaml.safe_load(fp_exp.config.read_text(encoding="utf-8")))
    settings["lm"] = "mpq_seq_rnn"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(MismatchError):
        host.LMTask.build_model_from_file(tmp_path / "config.yaml", tmp_path / "foreign.pth")


def test_packed_file_beside_another_lm(host, fp_exp, tmp_path):
    copied = shutil.copytree(fp_exp.path, tmp_path / "exp")
    with pytest.raises(InputError, match="there is no file .*packed.safetensors"):
        host.LMTask.build_model_from_file(fp_exp.config, copied / "packed.safetensors")
    (copied / "packed.safetensors").write_bytes(b"x")
    with pytest.raises(MismatchError, match="found lm: seq_rnn; expected lm: mpq_packed_rnn"):
        host.LMTask.build_model_from_file(None, copied / "packed.safetensors")


def test_packed_file_is_loaded_strictly(
    host, packed_exp, quantized_exp, tmp_path, float_activations
):
    model, args = host.LMTask.build_model_from_file(None, str(packed_exp.checkpoint))
    assert args.lm == "mpq_packed_rnn" and type(model.lm).__name__ == "MpqPackedRNNLM"
    float_model, _ = host.LMTask.build_model_from_file(
        quantized_exp.config, quantized_exp.checkpoint
    )
    tokens = torch.tensor([[30, 5, 7, 2, 9], [30, 1, 1, 4, 4]])
    with torch.no_grad():
        ours, theirs = model.lm(tokens, None)[0], float_model.eval().lm(tokens, None)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not any(t.requires_grad for t in model.parameters())

    copied = shutil.copytree(packed_exp.path, tmp_path / "copy")
    config = yaml.safe_load((copied / "config.yaml").read_text(encoding="utf-8"))
    tokens = config["token_list"]
    config["token_list"] = [tokens[0], tokens[1], *reversed(tokens[2:-1]), tokens[-1]]
    (copied / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(MismatchError, match="another token list"):
        host.LMTask.build_model_from_file(None, copied / "packed.safetensors")
    with pytest.raises((MismatchError, InputError)):
        host.LMTask.build_model_from_file(packed_exp.config, quantized_exp.checkpoint)
    with pytest.raises(MismatchError, match="expected packed.safetensors"):
        host.LMTask.build_model_from_file(packed_exp.config, None)
    whole = packed_exp.checkpoint.read_bytes()
    (copied / "packed.safetensors").write_bytes(whole[:-7])
    with pytest.raises(FormatError):
        host.LMTask.build_model_from_file(packed_exp.config, copied / "packed.safetensors")


@pytest.mark.parametrize("name", ["lm_choices", "LMTask"])
def test_host_that_lacks_something(host, monkeypatch, name):
    from espnet2.tasks import lm

    monkeypatch.delattr(lm, name)
    with pytest.raises(HostError, match=rf"lacks espnet2.tasks.lm.{name}.*found ESPnet 20"):
        espnet_mpq.register()


def test_host_that_does_not_import(host, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "espnet2.tasks.lm", None)
    with pytest.raises(HostError, match="cannot be imported: found ModuleNotFoundError"):
        espnet_mpq.register()


def test_old_host(host, monkeypatch):
    import espnet

    monkeypatch.setattr(espnet, "__version__", "202301")
    with pytest.raises(HostError, match="too old: found ESPnet 202301"):
        espnet_mpq.register()


def test_weights_that_are_none_are_named_by_the_loader_and_the_trainer(host, fp_exp, tmp_path):
    pointer = tmp_path / "valid.loss.best.pth"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer.*git lfs pull"):
        host.LMTask.build_model_from_file(str(fp_exp.config), str(pointer))
    args = argparse.Namespace(lm="mpq_seq_rnn", init_param=[f"{pointer}:lm:lm"])
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        host.LMTask.main_worker(args)
