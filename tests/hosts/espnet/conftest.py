"""Fixtures: speech to decode, small LMs trained by the host's own entry point in this process."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from lm_runs import ADMM, CHARS, PLAN


@pytest.fixture(scope="session")
def speech():
    """5000 samples of noise, float32: what the random ASR model of `asr_exp` decodes."""
    return (0.1 * torch.randn(5000, generator=torch.Generator().manual_seed(5))).numpy()


@pytest.fixture(scope="session")
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
        lm_conf = {}
        if "transformer" not in settings.get("lm", ""):
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


@pytest.fixture(scope="session")
def fp(train, tmp_path_factory):
    """Checkpoint of a small fp LM trained by the host's own classes."""
    folder = train(tmp_path_factory.mktemp("fp") / "lm", lm="seq_rnn", model="lm", max_epoch=4)
    return folder / "valid.loss.best.pth"


@pytest.fixture(scope="session")
def whole(train, fp, tmp_path_factory):
    """One uninterrupted run with a plan; read only."""
    return train(tmp_path_factory.mktemp("whole") / "lm", PLAN, init_param=[str(fp)], **ADMM)
