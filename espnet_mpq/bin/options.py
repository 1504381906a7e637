"""What all subcommands share: --config FILE.yaml under the command line, and provenance."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from espnet_mpq import __version__
from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.io import sha256_file


class Parser(argparse.ArgumentParser):
    """argparse's parser, which names near matches of a value that is no choice."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        # argparse has no public place for this.
        if action.choices is not None and value not in action.choices:
            if isinstance(value, str):
                todo = near_matches(value, action.choices)
            else:  # digits that look alike say nothing
                todo = "known: " + ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {todo}")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options of a subcommand; a YAML file given with --config comes first.

    The keys of the file are the names of the options; an option on the command line wins. The
    namespace gets ``command_line``, the command as typed.

    Raises:
        InputError: the file cannot be read, unknown keys or options (with near matches), an
            empty value, or one that is no UTF-8.
        SystemExit: argparse's own, for bad values and --help.
    """
    parser.allow_abbrev = False
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="options from a file: same names, command line wins"
    )
    argv = list(argv)
    from_file = read_config_options(parser, _config_of(argv))
    _refuse_unknown_options(parser, argv)
    args, unknown = parser.parse_known_args(from_file + argv)
    if unknown:
        parser.error("unexpected argument " + " ".join(unknown))
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        for one in value if isinstance(value, list) else [value]:
            _check_text(max([*action.option_strings, action.dest], key=len), one)
    args.command_line = shlex.join([*parser.prog.split(), *argv])
    return args


def _refuse_unknown_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Before argparse, which would complain of a missing option in place of its misspelling."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in argv:
        if word == "--":
            return
        name = word.split("=")[0]
        is_option = re.match(r"--?[A-Za-z_]", word) and " " not in name
        if is_option and name not in known:
            todo = near_matches("--" + name.lstrip("-"), [k for k in known if len(k) > 2])
            if not name.startswith("--"):
                todo += "; a value that begins with - is given as --option=VALUE"
            raise InputError(f"unknown option {name}", todo=todo)


def _check_text(name: str, value: object) -> None:
    """Raise InputError for a text that is no value and no name of a file."""
    if not isinstance(value, str):
        return
    if not value.strip():
        raise InputError(name, found=f"{value!r}, an empty text", expected="a value")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(name, found=ascii(value), expected="a name in UTF-8") from error
    if "\0" in value:
        raise InputError(name, found=ascii(value), expected="a name without NUL")


def _config_of(argv: Sequence[str]) -> Optional[str]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    # A missing value is reported by the real parser, in its words.
    if argv and argv[-1] == "--config":
        return None
    return finder.parse_known_args(list(argv))[0].config


def read_config_options(parser: argparse.ArgumentParser, path: Optional[str]) -> List[str]:
    """The options of a YAML file as command line words; raises InputError."""
    if path is None:
        return []
    _check_text("--config", path)
    values = read_yaml(path)
    actions = {
        name[2:]: action  # every spelling: --lm_exp and --asr_exp are one option
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    }
    positionals = {action.dest for action in parser._actions if not action.option_strings}
    words: List[str] = []
    for key, value in values.items():
        if key in positionals:
            raise InputError(f"{path}: {key} is given on the command line, not in the file")
        if key not in actions or key in ("config", "help"):
            known = [k for k in actions if k not in ("config", "help")]
            raise InputError(f"{path}: unknown key {key!r}", todo=near_matches(key, known))
        words += _as_words(actions[key], value, f"{path}: {key}")
    return words


def _as_words(action: argparse.Action, value, where: str) -> List[str]:
    option = max(action.option_strings, key=len)
    if value is None:
        return []
    if isinstance(value, dict):
        raise InputError(where, found="nested keys", expected="a value")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(where, found=repr(value), expected="true or false")
        return [option] if value else []
    for one in value if isinstance(value, list) else [value]:
        is_text = isinstance(one, str) or (type(one) is int and action.type is None)
        is_number = type(one) in (int, float) and action.type in (int, float)
        if not is_text and not is_number:
            kind = "a number" if action.type in (int, float) else "text, in quotes"
            raise InputError(where, found=repr(one), expected=kind)
    if isinstance(value, list):
        if action.nargs is None:
            raise InputError(where, found="a list", expected="one value")
        return [option, *(str(v) for v in value)]
    # "--option=value" keeps values that begin with a dash whole.
    return [f"{option}={value}"]


def read_yaml(path) -> dict:
    """A YAML file that holds keys and values; raises InputError."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}", found=error.strerror) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # 2021-13-45 is a ValueError
        raise InputError(f"{path} is not YAML", found=" ".join(str(error).split())) from error
    if value is None:
        return {}
    odd = [k for k in value if not isinstance(k, str)] if isinstance(value, dict) else [value]
    if odd:
        raise InputError(
            f"{path} does not hold options", found=repr(odd[0])[:80], expected="key: value"
        )
    return value


def check_group(args: argparse.Namespace, may_follow_table: bool = False) -> None:
    """Raise InputError unless --tying group and --group_size come together.

    ``may_follow_table``: one of them alone may complete what a sensitivity table says.
    """
    from espnet_mpq.plan import MOST_COLS

    tying, size = args.tying, args.group_size
    if size is not None and not 1 <= size <= MOST_COLS:
        raise InputError("--group_size", found=size, expected=f"1 .. {MOST_COLS} columns")
    if tying == "group" and size is None and not may_follow_table:
        raise InputError(
            "--tying group needs --group_size",
            expected="columns that share a scale, such as --group_size 64",
        )
    if size is not None and tying != "group" and not (tying is None and may_follow_table):
        found = f"--group_size {size}" + ("" if tying is None else f" with --tying {tying}")
        raise InputError("--group_size goes with --tying group", found=found)


def check_ngpu(ngpu: int) -> None:
    """Raises InputError for more GPUs than this machine has, or fewer than none."""
    import torch

    n_gpus = torch.cuda.device_count()
    if not 0 <= ngpu <= n_gpus:
        raise InputError("--ngpu", found=ngpu, expected=f"0 .. {n_gpus} on this machine")


def provenance(args: argparse.Namespace, inputs: Dict[str, Optional[str]]) -> dict:
    """Tool version, command line, resolved options, and path and SHA-256 of every input file."""
    hidden = ("command_line", "config")
    return {
        "tool_version": __version__,
        "command_line": getattr(args, "command_line", None),
        "options": {k: v for k, v in vars(args).items() if k not in hidden and not callable(v)},
        "inputs": {
            role: {"path": str(path), "sha256": sha256_file(path)}
            for role, path in inputs.items()
            if path is not None
        },
    }
