"""Reads config.yaml of an experiment of the host, and refuses what no model can be made of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Mapping

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.file_kind import refuse_unfetched
from espnet_mpq.hosts.espnet.kinds import FORM, Kind, kind_of

FROM_HOST = {"self", "lm", "vocab_size"}  # arguments that do not come from config.yaml


def find_config(folder: Path) -> Path:
    """Return folder/config.yaml or raise InputError that lists what is there."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder",
            expected="an experiment (exp/lm_..., exp/asr_...) with config.yaml and a checkpoint",
        )
    config = folder / "config.yaml"
    refuse_unfetched(config)
    if not config.is_file():
        raise InputError(
            f"{folder} is not an experiment: no config.yaml",
            found=listing(folder),
            expected="config.yaml and valid.loss.best.pth, as lm_train leaves them, or those of "
            "asr_train",
        )
    return config


def listing(folder: Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "an empty folder"


def read_config(config: Path) -> dict:
    """config.yaml of an experiment as a dict, ``token_list`` as the list of tokens.

    Raises:
        InputError: unreadable, of no known kind, or a value of a wrong type.
    """
    import yaml

    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{config} cannot be read as YAML", found=error) from error
    except ValueError as error:  # not UTF-8, or 2021-13-45
        is_text = not isinstance(error, UnicodeDecodeError)
        todo = "put quotes around texts that look like dates" if is_text else None
        raise InputError(f"{config} cannot be read as YAML", found=error, todo=todo) from error
    try:
        kind = kind_of(settings)
    except InputError as error:
        raise error.at(config) from error
    for key, (types, expected) in {**FORM, **kind.form}.items():
        if key in settings and not isinstance(settings[key], types):
            raise InputError(
                f"{config}: malformed {key}",
                found=repr(settings[key])[:80],
                expected=expected,
                todo=f"give the config.yaml that {kind.train} wrote",
            )
    settings["token_list"] = read_token_list(config, settings["token_list"])
    for key in kind.class_options:  # the host compares them in lower case
        if settings.get(key) is not None:
            settings[key] = settings[key].lower()
    try:
        kind.check(settings)
    except InputError as error:
        raise error.at(config) from error
    return settings


def check_keys(config: Path, option: str, conf: Mapping, cls: type) -> None:
    """Raise InputError for keys of ``conf`` that ``cls`` does not know, or lacks."""
    known, needed = set(), set()
    for base in cls.__mro__:  # mixins hand on what is not theirs
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        known |= {p.name for p in named} - FROM_HOST
        needed |= {p.name for p in named if p.default is p.empty} - FROM_HOST
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    for key in conf:
        if key not in known:
            todo = near_matches(key, sorted(known))
            raise InputError(f"{config}: unknown key {option}.{key}", todo=todo)
    missing = sorted(needed - set(conf))
    if missing:
        found = "no " + ", ".join(missing)
        raise InputError(f"{config}: keys of {option} are missing", found=found)


def check_classes(config: Path, kind: Kind, settings: Mapping) -> None:
    """Raise InputError for names of classes that the host does not have, and keys of an LM's."""
    for option, choices in kind.choices().items():
        choice = settings.get(option, choices.default)
        if choice is not None and choice not in choices.classes:
            raise InputError(
                f"{config} names an unknown {option} class",
                found=f"{option}: {choice}",
                todo=near_matches(choice, choices.classes),
            )
        if choice is not None and kind.has_plain_keys:
            conf = settings.get(f"{option}_conf", {})
            check_keys(config, f"{option}_conf", conf, choices.classes[choice])


def read_token_list(config: Path, value: object) -> list:
    """``token_list`` of config.yaml: tokens inline, or a file of them, read as the host does.

    Raises:
        InputError: neither, no such file (a relative path counts from the current folder), or an
            entry that YAML does not take for text.
    """
    if isinstance(value, str):
        refuse_unfetched(value)
        try:
            # Lines as the host splits them: str.splitlines would split inside tokens too.
            with open(value, encoding="utf-8") as lines:
                return [line.rstrip() for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the token_list file of {config} cannot be read",
                found=f"{value}: {getattr(error, 'strerror', None) or error}",
                todo="run this in the recipe folder, where the model was trained",
            ) from error
    if not isinstance(value, list):
        raise InputError(
            f"{config} has no token list",
            found=repr(value)[:80],
            expected="a list of tokens, as the host writes it, or the path of tokens.txt",
        )
    odd = [k for k, token in enumerate(value) if not isinstance(token, str)]
    if odd:
        also = f" ({len(odd)} entries are no text)" if len(odd) > 1 else ""
        raise InputError(
            f"{config}: token_list, entry {odd[0]} is {str(value[odd[0]])[:40]}{also}",
            found=f"{type(value[odd[0]]).__name__}, not text",
            expected="text",
            todo="put quotes around it, as the host does: YAML reads bare yes, no, on, off, null, "
            "numbers and dates as other things",
        )
    return value
