"""Registers the plugin's classes with ESPnet: the only file that changes attributes of the host."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
from pathlib import Path
from typing import Optional, Union

from espnet_mpq.errors import HostError, InputError, MismatchError
from espnet_mpq.hosts.espnet.config_file import check_keys
from espnet_mpq.hosts.espnet.environment.espnet import check_host, prepare_host
from espnet_mpq.hosts.espnet.families import CLASSES, CONF, OPTION, is_ours, is_packed
from espnet_mpq.hosts.espnet.loading import build_packed
from espnet_mpq.hosts.espnet.recogniser import check_recogniser, remember_recogniser
from espnet_mpq.state_file import check_file

LOG = logging.getLogger("espnet_mpq")
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
        (task.lm_choices, CLASSES),
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


def watch_recognisers() -> None:
    """From now on an LM must have the token list of a recogniser loaded before it. Idempotent.

    For programs that decode: ESPnet adds the scores of both by their ids, whatever the tokens.

    Raises:
        HostError: as `register`.
    """
    register()
    task = importlib.import_module("espnet2.tasks.abs_task").AbsTask
    if not hasattr(task.build_model_from_file, "mpq_original"):
        task.build_model_from_file = _wrap_recogniser_loader(task.build_model_from_file)


def _wrap_recogniser_loader(original):
    """A classmethod like the host's build_model_from_file that remembers the token lists."""

    @functools.wraps(original.__func__)
    def build_model_from_file(cls, config_file=None, model_file=None, device: str = "cpu"):
        model, args = original.__func__(cls, config_file, model_file, device)
        remember_recogniser(args, config_file or model_file)
        return model, args

    build_model_from_file.mpq_original = original
    return classmethod(build_model_from_file)


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
            model, args = build_packed(cls, config_file, model_file, device)
            check_recogniser(args, config_file or model_file)
            return model, args
        if model_file is not None:
            check_file(model_file)  # the host's own errors do not tell what is in its place
        model, args = original.__func__(cls, config_file, model_file, device)
        check_recogniser(args, config_file)
        if is_packed(getattr(args, OPTION)):
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
        name = getattr(args, OPTION)
        if is_ours(name):
            cls_ = importlib.import_module("espnet2.tasks.lm").lm_choices.classes[name.lower()]
            where = getattr(args, "config", None) or "the training options"
            check_keys(where, CONF, getattr(args, CONF, None) or {}, cls_)
            for file in getattr(args, "init_param", None) or ():
                check_file(file.split(":")[0])  # FILE:SRC:DST:EXCLUDE
        if getattr(args, "use_deepspeed", False):
            if is_ours(name):
                raise InputError(
                    "a low-bit LM cannot be trained with deepspeed",
                    found=f"use_deepspeed: true, lm: {name}",
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
