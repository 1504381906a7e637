"""Checks the values of training options that a user wrote in YAML, before anything runs."""

from __future__ import annotations

import inspect
import math
import warnings
from argparse import Action
from dataclasses import fields
from typing import Callable, Dict, Mapping, Optional

import torch
import yaml

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.training.options import AdmmOptions

# Option -> the least value that makes sense.
LEAST = {
    **dict.fromkeys(("max_epoch", "accum_grad", "keep_nbest_models", "num_iters_per_epoch"), 1),
    **dict.fromkeys(("batch_size", "batch_bins", "valid_batch_size", "valid_batch_bins"), 1),
    **dict.fromkeys(("min_batch_size", "max_batch_size", "log_interval"), 1),
    **dict.fromkeys(("seed", "num_workers", "patience", "ngpu", "nbest_averaging_interval"), 0),
}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}
CRITERIA = ("best_model_criterion", "early_stopping_criterion")
YAML_WORDS = "; YAML reads yes, no, on and off as true and false"


def check_values(options: Mapping, where: str = "training option") -> dict:
    """The options with every value of the type that the host's parser would make of it.

    Unknown names are left to the caller. Groups (``optim_conf``) are only read for numbers that
    YAML takes for text; `check_optimizer` does the rest.

    Raises:
        InputError: a value of a wrong type, outside its range, or no choice (with near matches).
    """
    register()
    from espnet2.tasks.lm import LMTask

    # Not LMTask.get_default_config(): it parses sys.argv, where our own options may stand.
    actions = {action.dest: action for action in LMTask.get_parser()._actions}
    checked = {}
    for key, value in options.items():
        name = f"{where} {key}"
        if key.endswith("_conf"):
            checked[key] = _group(value, name)
        elif key in actions:
            checked[key] = _value(actions[key], value, name)
            _check_range(key, checked[key], name)
        else:
            checked[key] = value
    return checked


def check_optimizer(settings: Mapping, where: str = "training option") -> None:
    """Raise InputError unless the host can make the optimizer and the scheduler of ``settings``."""
    from espnet2.tasks.abs_task import optim_classes, scheduler_classes

    parameter = torch.nn.Parameter(torch.zeros(1))
    name = settings.get("optim", "adadelta")
    optimizer = _make(where, "optim", name, settings, optim_classes, [parameter])
    name = settings.get("scheduler")
    if name is not None:
        _make(where, "scheduler", name, settings, scheduler_classes, optimizer)


def check_admm(settings: Mapping, where: str = "training option") -> None:
    """Raise InputError for values of mpq_* that ADMM training would refuse."""
    values = {}
    for field in fields(AdmmOptions):
        name = f"mpq_{field.name}"
        if name in settings:
            values[field.name] = settings[name]
    try:
        options = AdmmOptions(**values)
    except InputError as error:
        raise error.at(where) from error
    distill = settings.get("mpq_distill", 0.0)
    if not 0 <= distill <= 1:
        raise InputError(f"{where} mpq_distill", found=distill, expected="a weight in 0..1")
    if options.finish_epochs > settings["max_epoch"]:
        raise InputError(
            f"{where} mpq_finish_epochs",
            found=options.finish_epochs,
            expected=f"at most max_epoch, which is {settings['max_epoch']}",
        )


def _value(action: Action, value: object, name: str) -> object:
    if value is None:
        if action.default is None or (action.type and _try(action.type, "none") is None):
            return None
        raise InputError(name, found="null", expected=_kind_words(action))
    if action.nargs is None and type(action).__name__ != "_AppendAction":
        return _scalar(action, value, name)
    if action.dest == "keep_nbest_models" and type(value) is int:
        return value
    if not isinstance(value, (list, tuple)):
        found = f"{value!r}, one value"
        raise InputError(name, found=found, expected=f"a list: {name.split()[-1]}: [...]")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise InputError(name, found=repr(value)[:80], expected=f"{action.nargs} values")
    return [_scalar(action, one, name) for one in value]


def _scalar(action: Action, value: object, name: str) -> object:
    """One value, converted as the host's parser converts text."""
    kind = _kind(action)
    if kind is tuple:
        parts = _try(action.type, value) if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
            raise InputError(name, found=repr(value)[:80], expected="a list of texts")
        return list(parts)
    if isinstance(value, str):
        made = _try(action.type, value) if action.type else value
        if made is _FAILED:
            raise _wrong(name, value, _kind_words(action))
        value = made
    elif kind is bool and (isinstance(value, bool) or value in (0, 1)):
        value = bool(value)
    elif not _is_kind(value, kind):
        raise _wrong(name, value, _kind_words(action))
    if isinstance(value, float) and math.isnan(value):
        raise InputError(name, found="nan", expected=KINDS[float])
    if action.choices is not None and value not in action.choices:
        todo = near_matches(value, [c for c in action.choices if c is not None])
        raise InputError(name, found=repr(value), todo=todo)
    return value


def _is_kind(value: object, kind: type) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


_FAILED = object()


def _try(convert: Callable, value: object) -> object:
    try:
        return convert(value)
    except Exception:  # argparse's types raise what they like
        return _FAILED


def _kind(action: Action) -> type:
    """bool, int, float or str: what the host makes of text; tuple: "a,b" or "a,b,c"."""
    if action.type is None or isinstance(action.default, float):
        return str if action.type is None else float
    made = _try(action.type, "1")
    return tuple if made is _FAILED else type(made)


def _kind_words(action: Action) -> str:
    if action.choices is not None:
        return "one of " + ", ".join(map(str, action.choices))
    return KINDS.get(_kind(action), "texts")


def _wrong(name: str, value: object, expected: str) -> InputError:
    """The error for a value of a wrong type, with the spelling that YAML takes."""
    if isinstance(value, bool):
        expected += YAML_WORDS
    elif expected.startswith(("text", "one of")):
        expected += f', in quotes: "{value}"'
    number = _try(float, value) if isinstance(value, str) else _FAILED
    if number is not _FAILED:
        expected += f"; in YAML, {value} is text: write {_yaml_number(number)}"
    return InputError(name, found=repr(value)[:80], expected=expected)


def _yaml_number(value: float) -> str:
    return yaml.safe_dump(value).split()[0]


def _group(value: object, name: str) -> Optional[dict]:
    """A group of options; raises InputError if it is none, or for numbers written as text."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(name, found=repr(value)[:80], expected="keys and values")
    for key, inner in value.items():
        inner_name = f"{name}.{key}"
        if not isinstance(key, str):
            raise InputError(inner_name, found=repr(key), expected="a name, in quotes")
        for one in inner if isinstance(inner, (list, tuple)) else [inner]:
            if isinstance(one, str) and _try(float, one) is not _FAILED:
                raise _wrong(inner_name, one, "a number")
            if isinstance(one, float) and not math.isfinite(one):
                raise InputError(inner_name, found=one, expected="a finite number")
    return dict(value)


def _check_range(key: str, value: object, name: str) -> None:
    least = LEAST.get(key)
    for one in value if isinstance(value, list) else [value]:
        if least is not None and one is not None and one < least:
            raise InputError(name, found=one, expected=f"a whole number from {least}")
    for phase, _, mode in _criteria(key, value, name):
        if phase not in ("train", "valid") or mode not in ("min", "max"):
            expected = "(train or valid), the name of a value, (min or max)"
            raise InputError(name, found=repr(value)[:80], expected=expected)


def _criteria(key: str, value: object, name: str) -> list:
    if key not in CRITERIA:
        return []
    triples = value if key == "best_model_criterion" else [value]
    if any(len(triple) != 3 for triple in triples):
        raise InputError(name, found=repr(value)[:80], expected="[valid, loss, min]")
    return triples


def _make(where: str, option: str, name: object, settings: Mapping, classes: Dict, argument):
    """The optimizer or scheduler that the host would make, to find out whether it can."""
    cls = classes.get(str(name).lower())
    if cls is None:
        todo = near_matches(str(name).lower(), classes)
        raise InputError(f"{where} {option}", found=repr(name), todo=todo)
    option = f"{where} {option}_conf"
    conf = settings.get(option.split()[-1]) or {}
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # self, argument
    known = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for key, value in conf.items():
        if key not in known and len(known) == len(parameters):
            todo = f"{near_matches(key, known)} ({cls.__name__})"
            raise InputError(f"{option}: unknown key {key!r}", todo=todo)
        if key in known:
            _check_like(f"{option}.{key}", value, known[key].default)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls(argument, **conf)
    except Exception as error:  # each class has its own
        raise InputError(
            option,
            found=" ".join(str(error).split())[:160],
            expected=f"options of {cls.__name__}",
        ) from error


def _check_like(name: str, value: object, default: object) -> None:
    """Raise InputError unless ``value`` is of the kind of a parameter's default."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise _wrong(name, value, KINDS[bool])
    elif isinstance(default, (int, float)):
        if not _is_kind(value, float):
            raise _wrong(name, value, KINDS[float])
    elif isinstance(default, tuple):
        is_list = isinstance(value, (list, tuple)) and len(value) == len(default)
        if not is_list or not all(_is_kind(one, float) for one in value):
            raise InputError(name, found=repr(value), expected=f"a list of {len(default)} numbers")
