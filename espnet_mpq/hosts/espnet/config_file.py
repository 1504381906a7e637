"""Reads config.yaml of an LM experiment of the host, and refuses what no LM can be made of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Mapping

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.file_kind import refuse_unfetched
from espnet_mpq.hosts.espnet import families

NEEDED = (families.OPTION, families.CONF, "token_list")
AS_WRITTEN = "the config.yaml that lm_train wrote"
FROM_HOST = {"self", "lm", "vocab_size"}  # arguments that do not come from config.yaml
NULL = type(None)
# Key -> (types, in words); a key may be absent, but for NEEDED.
FORM = {
    **dict.fromkeys(("lm", "model"), ((str,), "the name of a class")),
    **dict.fromkeys(("lm_conf", "model_conf"), ((dict,), "keys and values")),
    **dict.fromkeys(("optim_conf", "scheduler_conf"), ((dict, NULL), "keys and values")),
    **dict.fromkeys(("token_type", "bpemodel", "g2p", "init"), ((str, NULL), "text or null")),
    **dict.fromkeys(("cleaner", "non_linguistic_symbols"), ((str, list, NULL), "text or a list")),
    "max_epoch": ((int, NULL), "a whole number"),
}


def find_config(folder: Path) -> Path:
    """Return folder/config.yaml or raise InputError that lists what is there."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder",
            expected="an LM experiment (--lm_exp exp/lm_...) with config.yaml and a checkpoint",
        )
    config = folder / "config.yaml"
    refuse_unfetched(config)
    if not config.is_file():
        raise InputError(
            f"{folder} is not an LM experiment: no config.yaml",
            found=listing(folder),
            expected="config.yaml and valid.loss.best.pth, as lm_train leaves them",
        )
    return config


def listing(folder: Path) -> str:
    """The first names in a folder, for a message."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "an empty folder"


def read_config(config: Path) -> dict:
    """config.yaml of an experiment as a dict, ``token_list`` as the list of tokens.

    Raises:
        InputError: unreadable, not of an LM, or a value of a wrong type.
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
    missing = [k for k in NEEDED if not isinstance(settings, dict) or k not in settings]
    if missing:
        raise InputError(
            f"{config} is not the configuration of an LM",
            found=f"no {', '.join(missing)}",
            expected=AS_WRITTEN,
        )
    for key, (types, expected) in FORM.items():
        if key in settings and not isinstance(settings[key], types):
            raise InputError(
                f"{config}: malformed {key}",
                found=repr(settings[key])[:80],
                expected=expected,
                todo="give " + AS_WRITTEN,
            )
    settings["token_list"] = read_token_list(config, settings["token_list"])
    for key in ("lm", "model"):  # the host compares them in lower case
        if key in settings:
            settings[key] = settings[key].lower()
    if settings.get("model") == "lm_multitask":
        raise InputError(
            f"{config}: multitask LMs are not supported",
            found="model: lm_multitask, whose sentences begin with the name of a task",
            expected="model: lm, whose sentences begin with <sos/eos>",
        )
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


def check_sizes(config: Path, settings: Mapping) -> None:
    """Raise InputError for an ``lm_conf`` of which no LM can be made."""
    name, conf = settings[families.OPTION], settings[families.CONF]
    for key, value in conf.items():
        if key.endswith("dropout_rate") and not isinstance(value, (int, float)):
            what = f"{config}: {families.CONF}.{key}"
            raise InputError(what, found=repr(value), expected="a number")
    if families.find_family(name) is not None:
        try:
            families.architecture_of(name, conf, len(settings["token_list"]))
        except InputError as error:
            raise error.at(config) from error


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
                todo="run this in the recipe folder, where the LM was trained",
            ) from error
    if not isinstance(value, list):
        raise InputError(
            f"{config} has no token list",
            found=repr(value)[:80],
            expected="a list of tokens, as lm_train writes it, or the path of tokens.txt",
        )
    odd = [k for k, token in enumerate(value) if not isinstance(token, str)]
    if odd:
        also = f" ({len(odd)} entries are no text)" if len(odd) > 1 else ""
        raise InputError(
            f"{config}: token_list, entry {odd[0]} is {str(value[odd[0]])[:40]}{also}",
            found=f"{type(value[odd[0]]).__name__}, not text",
            expected="text",
            todo="put quotes around it, as lm_train does: YAML reads bare yes, no, on, off, null, "
            "numbers and dates as other things",
        )
    return value
