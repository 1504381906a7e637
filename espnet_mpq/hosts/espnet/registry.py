"""Registers the plugin's classes with ESPnet: the only file that changes attributes of the host."""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
from pathlib import Path
from typing import Mapping, Optional, Tuple, Union

from espnet_mpq.errors import HostError, InputError, MismatchError
from espnet_mpq.hosts.espnet.config_file import check_keys
from espnet_mpq.hosts.espnet.environment.espnet import check_host, prepare_host
from espnet_mpq.hosts.espnet.families import CLASSES, CONF, OPTION, is_ours
from espnet_mpq.hosts.espnet.kinds import ASR, KINDS, LM, Kind, load_class
from espnet_mpq.hosts.espnet.loading import build_packed
from espnet_mpq.hosts.espnet.recogniser import check_recogniser, remember_recogniser
from espnet_mpq.state_file import check_file

LOG = logging.getLogger("espnet_mpq")
MODEL_CLASSES = {"mpq_lm": ("lm.model", "MpqLanguageModel")}
TRAINER = ("training.trainer", "MpqTrainer")
# What we rely on in the module of a task: dotted attribute -> what it is for.
NEEDED = {
    LM.name: {
        "lm_choices.classes": "the list of LM classes (--lm)",
        "model_choices.classes": "the list of LM models (--model)",
        "LMTask.trainer": "the trainer of LMs",
        "LMTask.main_worker": "training one process of an LM",
        "LMTask.build_model": "building an LM from its configuration",
        "LMTask.build_model_from_file": "loading an LM for decoding",
        "LMTask.build_preprocess_fn": "turning text into tokens",
    },
    ASR.name: {
        "model_choices.classes": "the list of recognisers (--model)",
        "encoder_choices.classes": "the list of encoders",
        "decoder_choices.classes": "the list of decoders",
        "ASRTask.build_model": "building a recogniser from its configuration",
        "ASRTask.build_model_from_file": "loading a recogniser for decoding",
        "ASRTask.build_preprocess_fn": "turning transcripts into tokens",
    },
}


def register(*kinds: str) -> None:
    """Register model classes, trainer and the loader of packed files. Idempotent.

    Without any mpq option the host goes on as before: its own choices stay the defaults and
    the trainer and the loader hand over to the host's.

    Args:
        kinds: names of kinds.KINDS; none: all of them. Importing the host's task of recognisers
            takes seconds, which programs of language models need not spend.

    Raises:
        HostError: ESPnet is missing, too old, does not import, or lacks something we need.
    """
    prepare_host()
    for name in kinds or KINDS:
        kind = KINDS[name]
        host = _import_task(kind)
        task = getattr(host, kind.task)
        if kind is LM:
            _register_training(host)
        else:
            _add_classes(host.model_choices, kind.classes)
        if not hasattr(task.build_model_from_file, "mpq_original"):
            task.build_model_from_file = _wrap_loader(task.build_model_from_file, kind)


def _register_training(host) -> None:
    """The classes that train language models, and their trainer."""
    _add_classes(host.lm_choices, CLASSES)
    _add_classes(host.model_choices, MODEL_CLASSES)
    trainer = load_class(*TRAINER)
    if host.LMTask.trainer is not trainer:
        if not issubclass(trainer, host.LMTask.trainer):
            LOG.warning(
                "replacing %s, which another plugin set as trainer of LMs", host.LMTask.trainer
            )
        host.LMTask.trainer = trainer
    if not hasattr(host.LMTask.main_worker, "mpq_original"):
        host.LMTask.main_worker = _wrap_worker(host.LMTask.main_worker)


def watch_recognisers() -> None:
    """From now on an LM must have the token list of a recogniser loaded before it. Idempotent.

    For programs that decode: ESPnet adds the scores of both by their ids, whatever the tokens.

    Raises:
        HostError: as `register`, which must have been called.
    """
    task = _abs_task()
    if not hasattr(task.build_model_from_file, "mpq_original"):
        task.build_model_from_file = _wrap_recogniser_loader(task.build_model_from_file)


def _abs_task():
    return importlib.import_module("espnet2.tasks.abs_task").AbsTask


def _compare_tokens(kind: Kind, args: argparse.Namespace, where: object) -> None:
    """What the loaders of our kinds do where recognisers are watched."""
    if kind is LM:
        check_recogniser(args, where)
    elif hasattr(_abs_task().build_model_from_file, "mpq_original"):
        remember_recogniser(args, where)


def _wrap_recogniser_loader(original):
    """A classmethod like the host's build_model_from_file that remembers the token lists."""

    @functools.wraps(original.__func__)
    def build_model_from_file(cls, config_file=None, model_file=None, device: str = "cpu"):
        model, args = original.__func__(cls, config_file, model_file, device)
        remember_recogniser(args, config_file or model_file)
        return model, args

    build_model_from_file.mpq_original = original
    return classmethod(build_model_from_file)


def _add_classes(choices, classes: Mapping[str, Tuple[str, str]]) -> None:
    for choice, place in classes.items():
        if choice not in choices.classes:
            choices.classes[choice] = load_class(*place)


def _import_task(kind: Kind):
    """Import the module of the host's task and check that everything needed is there."""
    words = "LM task" if kind is LM else "task of recognisers"
    try:
        task = importlib.import_module(kind.module)
    except (ImportError, OSError) as error:
        raise HostError(
            f"ESPnet is installed but its {words} cannot be imported",
            found=f"{type(error).__name__}: {error}",
            expected="an import without error",
            todo=f"install what is missing, see: python -c 'import {kind.module}'",
        ) from error
    for dotted, purpose in NEEDED[kind.name].items():
        value = task
        for name in dotted.split("."):
            value = getattr(value, name, None)
        if value is None:
            raise HostError(
                f"this ESPnet lacks {kind.module}.{dotted}, {purpose}",
                found=f"ESPnet {check_host()}",
                expected="a version between 202402 and 202511",
                todo='install one of these: pip install "espnet==202511"',
            )
    return task


def _wrap_loader(original, kind: Kind):
    """A classmethod like the host's build_model_from_file that knows *.safetensors files.

    ``original`` is the bound method; its function is called with the class in use, so that
    subclasses of the task keep their own build_model.
    """

    @functools.wraps(original.__func__)
    def build_model_from_file(
        cls,
        config_file: Optional[Union[Path, str]] = None,
        model_file: Optional[Union[Path, str]] = None,
        device: str = "cpu",
    ):
        if model_file is not None and Path(model_file).suffix == ".safetensors":
            model, args = build_packed(cls, kind, config_file, model_file, device)
            _compare_tokens(kind, args, config_file or model_file)
            return model, args
        if model_file is not None:
            check_file(model_file)  # the host's own errors do not tell what is in its place
        model, args = original.__func__(cls, config_file, model_file, device)
        _compare_tokens(kind, args, config_file or model_file)
        if kind.is_packed(vars(args)):
            raise MismatchError(
                f"{config_file} describes a packed {kind.noun}, which this file does not hold",
                found=f"model file {model_file}",
                expected="packed.safetensors",
                todo=f"give {kind.file_option} (or --model_file) .../packed.safetensors",
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
