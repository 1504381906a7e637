"""Writes train_lm_mpq.yaml: the fp LM's own training options, changed for training with a plan."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from typing import Mapping, Optional

import yaml

from espnet_mpq.errors import InputError, MismatchError, PlanError, near_matches
from espnet_mpq.hosts.espnet import families
from espnet_mpq.hosts.espnet.experiment.opened import Experiment
from espnet_mpq.hosts.espnet.lm.option_values import (
    check_admm,
    check_optimizer,
    check_values,
)
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.plan import Plan
from espnet_mpq.training.options import AdmmOptions

LOG = logging.getLogger("espnet_mpq")
# Taken over from the fp LM. Not: data, output, token_list (given on the command line, as for the
# fp LM), fold_length (the host appends to it) and the scheduler (made for training from scratch).
INHERITED = (
    "token_type",
    "bpemodel",
    "non_linguistic_symbols",
    "cleaner",
    "g2p",
    "seed",
    "num_workers",
    "batch_type",
    "batch_size",
    "batch_bins",
    "valid_batch_type",
    "valid_batch_size",
    "valid_batch_bins",
    "sort_in_batch",
    "sort_batch",
    "num_iters_per_epoch",
    "accum_grad",
    "grad_clip",
    "grad_clip_type",
    "use_amp",
    "use_tensorboard",
    "use_matplotlib",
    "optim",
    "optim_conf",
    "model_conf",
)
# Fine-tuning: half the peak learning rate of the fp LM, fewer epochs.
LR_FACTOR = 0.5
# Adam and its kin (optim names with "adam") diverge far above this.
ADAM_LR_MAX, ADAM_LR_FALLBACK = 1e-2, 1e-3
FEWEST_EPOCHS, MOST_EPOCHS = 5, 10
# LM class of the fp LM -> the class that trains it with a plan.
TRAINED_AS = {lm: family.trained for family in families.FAMILIES for lm in family.floats}
COMMENTS = {
    "lm": "The LM and the bits of every cluster (written by mpq plan; keep the plan as it is).",
    "model": "Loss; mpq_lm can distill from the fp LM (mpq_distill).",
    "token_type": "As the fp LM was trained.",
    "optim": "Optimizer of the fp LM, half its peak learning rate, no scheduler.",
    "max_epoch": "Epochs, and the model to keep: the best one on the grid.",
    "mpq_gamma": "ADMM: penalty, and its growth per epoch up to mpq_gamma_max.",
    "mpq_dual_period": "Updates between two dual updates, 0 = once per epoch.",
    "mpq_extragradient": "Two gradients per update as in the papers (twice the time).",
    "mpq_finish_epochs": "Last epochs: codes frozen, scales, biases and norms tuned.",
    "mpq_distill": "Weight 0..1 of KL(fp LM || LM) in the loss; the fp LM is the --init_param.",
}


def train_settings(exp: Experiment, plan: Plan, user: Optional[Mapping] = None) -> dict:
    """Training options of the host for ADMM training of ``exp``'s LM with ``plan``.

    Args:
        user: options of the host that win over ours; lm_conf is merged, all others replaced.

    Raises:
        InputError: unknown options (with near matches), or an LM that cannot be trained with a
            plan; PlanError: ``user`` has a plan of its own.
    """
    fp = vars(exp.args)
    if fp["lm"] not in TRAINED_AS:
        raise InputError(
            f"{exp.config}: no training with a plan for this LM",
            found=f"lm: {fp['lm']}",
            expected="lm: one of " + ", ".join(TRAINED_AS),
        )
    lm_conf = {k: v for k, v in fp["lm_conf"].items() if k != "plan"}
    lm_conf["plan"] = plan.inline()
    settings = {"lm": TRAINED_AS[fp["lm"]], "lm_conf": lm_conf, "model": "mpq_lm"}
    settings.update({k: fp[k] for k in INHERITED if fp.get(k) not in (None, {}, [])})
    if "optim_conf" in settings:
        # Switches that are off differ between torch versions; leaving them out means the same.
        conf = settings["optim_conf"].items()
        conf = {k: v for k, v in conf if v is not None and v is not False}
        settings["optim_conf"] = {**conf, **_fine_tuning_lr(fp, conf)}
    for option, package in (("use_tensorboard", "tensorboard"), ("use_matplotlib", "matplotlib")):
        if settings.get(option) and importlib.util.find_spec(package) is None:
            LOG.warning("%s is not installed: %s is set to false", package, option)
            settings[option] = False
    fp_epochs = int(fp.get("max_epoch") or 2 * MOST_EPOCHS)
    settings["max_epoch"] = min(MOST_EPOCHS, max(FEWEST_EPOCHS, (fp_epochs + 1) // 2))
    user = check_values(user or {})
    max_epoch = user.get("max_epoch", settings["max_epoch"])
    settings["keep_nbest_models"] = 1
    settings["best_model_criterion"] = [["valid", "loss", "min"]]
    settings.update(shown_settings(max_epoch))
    _merge(settings, user, str(exp.config))
    _check_made(settings, user, exp)
    return settings


def _check_made(settings: Mapping, user: Mapping, exp: Experiment) -> None:
    """Raise InputError for options that lm_train would stumble over; warn of inherited ones."""
    check_admm(settings)
    try:
        check_optimizer(settings)
    except InputError as error:
        if {"optim", "optim_conf", "scheduler", "scheduler_conf"} & set(user):
            raise
        LOG.warning("%s: %s; --train_config can change it", exp.config, error)


def _fine_tuning_lr(fp: Mapping, optim_conf: Mapping) -> dict:
    """{"lr": ...}: LR_FACTOR times the highest rate that the fp LM's schedule reached, or {}."""
    lr = optim_conf.get("lr")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        return {}
    schedule = fp.get("scheduler_conf") or {}
    if fp.get("scheduler") == "noamlr":
        # The rate at the end of the warm-up (espnet2.schedulers.noam_lr).
        size, steps = schedule.get("model_size", 320), schedule.get("warmup_steps", 25000)
        lr = lr / (float(size) * float(steps)) ** 0.5
    elif fp.get("scheduler") == "onecyclelr":
        lr = schedule.get("max_lr", lr)
    lr = LR_FACTOR * float(lr)
    if "adam" in str(fp.get("optim")) and lr > ADAM_LR_MAX:
        LOG.warning(
            "half the fp LM's learning rate, %g, is too high for %s: set to %g (--train_config "
            "with optim_conf: {lr: ...} changes it)",
            *(lr, fp.get("optim"), ADAM_LR_FALLBACK),
        )
        lr = ADAM_LR_FALLBACK
    return {"lr": lr}


def shown_settings(max_epoch: int) -> dict:
    """The --mpq_* options that a ready training file shows, with their defaults."""
    options = dataclasses.fields(AdmmOptions)
    settings = {f"mpq_{o.name}": o.default for o in options if o.metadata["shown"]}
    settings["mpq_finish_epochs"] = min(settings["mpq_finish_epochs"], max_epoch // 2)
    return {**settings, "mpq_distill": 0.0}


def _merge(settings: dict, user: Mapping, config: str) -> None:
    register()
    from espnet2.tasks.lm import LMTask

    # Not LMTask.get_default_config(): it parses sys.argv, where our own --config may stand.
    known = {action.dest for action in LMTask.get_parser()._actions}
    known -= {"help", *LMTask.exclude_opts()}
    for key, value in user.items():
        if key not in known:
            raise InputError(f"unknown training option {key!r}", todo=near_matches(key, known))
        if key in ("lm", "lm_conf"):
            continue
        settings[key] = value
    lm_conf = user.get("lm_conf") or {}
    if "plan" in lm_conf:
        raise PlanError("the training options have a plan of their own", todo="remove lm_conf.plan")
    if TRAINED_AS.get(str(user.get("lm", settings["lm"]))) != settings["lm"]:
        raise InputError(
            f"training with a plan of {config}",
            found=f"lm: {user['lm']}",
            expected=settings["lm"],
        )
    for key, value in lm_conf.items():
        if _is_dropout(key):
            if type(value) not in (int, float) or not 0 <= value < 1:
                name = f"training option lm_conf.{key}"
                raise InputError(name, found=repr(value), expected="a number from 0 to below 1")
        elif settings["lm_conf"].get(key, value) != value:
            raise MismatchError(
                f"the training options change the LM of {config}: lm_conf.{key}",
                found=repr(value),
                expected=repr(settings["lm_conf"][key]),
            )
    settings["lm_conf"] = {**lm_conf, **settings["lm_conf"]}
    settings["lm_conf"].update({k: v for k, v in lm_conf.items() if _is_dropout(k)})


def _is_dropout(key: str) -> bool:
    """The options of lm_conf that change the training and not the LM."""
    return key.endswith("dropout_rate")


def to_yaml(settings: Mapping, head: str) -> str:
    """The settings as YAML with comments; ``head`` becomes the comment at the top."""
    lines = [f"# {line}" for line in head.splitlines()]
    for key, value in settings.items():
        if key in COMMENTS:
            lines += ["", f"# {COMMENTS[key]}"]
        lines.append(yaml.safe_dump({key: _plain(value)}, sort_keys=False).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _plain(value):
    """Tuples as lists, which safe_dump can write."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
