"""Registers the plugin's classes with ESPnet: the only file that changes attributes of the host."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
from pathlib import Path
from typing import Optional, Union

from espnet_mpq.errors import HostError, InputError, MismatchError
from espnet_mpq.hosts.espnet.environment.espnet import check_host, prepare_host
from espnet_mpq.state_file import check_file

LOG = logging.getLogger("espnet_mpq")
# Host choice -> (module beside this one, class). Keys are lower case, as the host compares them.
LM_CLASSES = {
    "mpq_seq_rnn": ("lm.rnn", "MpqSequentialRNNLM"),
    "mpq_transformer": ("lm.transformer", "MpqTransformerLM"),
    "mpq_nas_seq_rnn": ("lm.nas", "MpqNasSequentialRNNLM"),
    "mpq_nas_transformer": ("lm.nas", "MpqNasTransformerLM"),
    "mpq_packed_rnn": ("lm.packed_rnn", "MpqPackedRNNLM"),
    "mpq_packed_transformer": ("lm.packed_transformer", "MpqPackedTransformerLM"),
}
PACKED = "mpq_packed"  # how the LMs begin that run packed files
MODEL_CLASSES = {"mpq_lm": ("lm.model", "MpqLanguageModel")}
TRAINER = ("training.trainer", "MpqTrainer")
# What we rely on in espnet2.tasks.lm: dotted attribute -> what it is for.
NEEDED = {
    "lm_choices.classes": "the list of LM classes (--lm)",
    "model_choices.classes": "the list of LM models (--model)",
    "LMTask.trainer": "the trainer of LMs",
    "LMTask.main_worker": "training one process of an LM",
    "LMTask.build_model": "building an LM from its configuration",
    "LMTask.build_model_from_file": "loading an LM for decoding",
    "LMTask.build_preprocess_fn": "turning text into tokens",
}


def register() -> None:
    """Register LM classes, model, trainer and the loader of packed files. Idempotent.

    Without any mpq option the host goes on as before: its own choices stay the defaults and
    the trainer and the loader hand over to the host's.

    Raises:
        HostError: ESPnet is missing, too old, does not import, or lacks something we need.
    """
    prepare_host()
    task = _import_task()
    for choices, classes in (
        (task.lm_choices, LM_CLASSES),
        (task.model_choices, MODEL_CLASSES),
    ):
        for choice, place in classes.items():
            if choice not in choices.classes:
                choices.classes[choice] = _load_class(*place)
    trainer = _load_class(*TRAINER)
    if task.LMTask.trainer is not trainer:
        if not issubclass(trainer, task.LMTask.trainer):
            LOG.warning(
                "replacing %s, which another plugin set as trainer of LMs", task.LMTask.trainer
            )
        task.LMTask.trainer = trainer
    if not hasattr(task.LMTask.build_model_from_file, "mpq_original"):
        task.LMTask.build_model_from_file = _wrap_loader(task.LMTask.build_model_from_file)
    if not hasattr(task.LMTask.main_worker, "mpq_original"):
        task.LMTask.main_worker = _wrap_worker(task.LMTask.main_worker)


def _import_task():
    """Import espnet2.tasks.lm and check that everything needed is there."""
    try:
        task = importlib.import_module("espnet2.tasks.lm")
    except (ImportError, OSError) as error:
        raise HostError(
            "ESPnet is installed but its LM task cannot be imported",
            found=f"{type(error).__name__}: {error}",
            expected="an import without error",
            todo="install what is missing, see: python -c 'import espnet2.tasks.lm'",
        ) from error
    for dotted, purpose in NEEDED.items():
        value = task
        for name in dotted.split("."):
            value = getattr(value, name, None)
        if value is None:
            raise HostError(
                f"this ESPnet lacks espnet2.tasks.lm.{dotted}, {purpose}",
                found=f"ESPnet {check_host()}",
                expected="a version between 202402 and 202511",
                todo='install one of these: pip install "espnet==202511"',
            )
    return task


def _load_class(module: str, name: str) -> type:
    return getattr(importlib.import_module(f"espnet_mpq.hosts.espnet.{module}"), name)


def _wrap_loader(original):
    """A classmethod like the host's build_model_from_file that knows *.safetensors files.

    ``original`` is the bound method; its function is called with the class in use, so that
    subclasses of LMTask keep their own build_model.
    """

    @functools.wraps(original.__func__)
    def build_model_from_file(
        cls,
        config_file: Optional[Union[Path, str]] = None,
        model_file: Optional[Union[Path, str]] = None,
        device: str = "cpu",
    ):
        if model_file is not None and Path(model_file).suffix == ".safetensors":
            return _build_packed(cls, config_file, model_file, device)
        if model_file is not None:
            check_file(model_file)  # the host's own errors do not tell what is in its place
        model, args = original.__func__(cls, config_file, model_file, device)
        if _is_packed_config(args):
            raise MismatchError(
                f"{config_file} describes a packed LM, which this file does not hold",
                found=f"model file {model_file}",
                expected="packed.safetensors",
                todo="give --lm_file (or --model_file) .../packed.safetensors",
            )
        return model, args

    build_model_from_file.mpq_original = original
    return classmethod(build_model_from_file)


def _wrap_worker(original):
    """A classmethod like the host's main_worker that lets stock LMs train with deepspeed.

    The host refuses every trainer but its own then, and ours does nothing for a stock LM.
    """

    @functools.wraps(original.__func__)
    def main_worker(cls, args: argparse.Namespace):
        if str(args.lm).startswith("mpq_"):
            for name in getattr(args, "init_param", None) or ():
                check_file(name.split(":")[0])  # FILE:SRC:DST:EXCLUDE
        if getattr(args, "use_deepspeed", False):
            if str(args.lm).startswith("mpq_"):
                raise InputError(
                    "a low-bit LM cannot be trained with deepspeed",
                    found=f"use_deepspeed: true, lm: {args.lm}",
                    expected="use_deepspeed: false",
                )
            from espnet2.train.trainer import Trainer

            own = vars(cls).get("trainer")  # None: inherited
            cls.trainer = Trainer
            try:
                return original.__func__(cls, args)
            finally:  # the host may have put its DeepSpeedTrainer there meanwhile
                if own is None:
                    del cls.trainer
                else:
                    cls.trainer = own
        return original.__func__(cls, args)

    main_worker.mpq_original = original
    return classmethod(main_worker)


def _is_packed_config(args: argparse.Namespace) -> bool:
    return str(getattr(args, "lm", "")).lower().startswith(PACKED)


def _build_packed(cls, config_file, model_file, device: str):
    """Build the packed LM that config.yaml describes and load it strictly.

    Raises:
        InputError: a file is missing; MismatchError: the configuration is of another LM;
        FormatError: the packed file is damaged.
    """
    import yaml

    from espnet_mpq.packed.load import load_into

    model_file = Path(model_file)
    config_file = model_file.parent / "config.yaml" if config_file is None else Path(config_file)
    for path in (config_file, model_file):
        if not path.is_file():
            raise InputError(
                f"there is no file {path}",
                expected="a directory written by `mpq pack`: config.yaml and packed.safetensors",
            )
    with config_file.open(encoding="utf-8") as file:
        args = argparse.Namespace(**yaml.safe_load(file))
    if not _is_packed_config(args):
        raise MismatchError(
            f"{model_file} is a packed LM, but {config_file} describes another",
            found=f"lm: {getattr(args, 'lm', None)}",
            expected="lm: " + " or ".join(lm for lm in LM_CLASSES if lm.startswith(PACKED)),
            todo=f"use {model_file.parent / 'config.yaml'}, which `mpq pack` wrote with it",
        )
    model = cls.build_model(args)
    load_into(model.lm, model_file, token_list=args.token_list)
    model.to(device)
    return model, args
