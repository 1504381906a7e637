"""The values that options of recipe scripts may have, each for itself: numbers, words, files.

Values are checked by the name of the option, which means the same in every script. An option may
be empty where it has no default.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional

from espnet_mpq.bin.options import read_yaml
from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.quant.spec import BITS, GRIDS, QUANTIZED_BITS, TYINGS

SENSITIVITIES = ("kl", "hessian", "nas", "uniform", "kl_printed", "fisher")
# What the shell, the host's scripts or their options take apart.
SHELL_CHARACTERS = re.compile(r"""[\s"'\\$`*?\[\]{}()<>|&;!]""")
NUMBER = r"[0-9]+(\.[0-9]*)?|\.[0-9]+"
# How the host names the checkpoints of a training.
CHECKPOINT = re.compile(r"(train|valid)\.\w+\.(best|ave(_\d+best)?)\.pth|latest\.pth|\d+epoch\.pth")
Options = Dict[str, str]  # name, without dashes -> value
Check = Callable[[str, str], None]


def whole(least: int, most: Optional[int] = None) -> Check:
    """A whole number from ``least`` to ``most``."""

    def check(option: str, value: str) -> None:
        right = re.fullmatch(r"[0-9]{1,10}", value) and least <= int(value)
        if not right or (most is not None and int(value) > most):
            limit = f"from {least} on" if most is None else f"from {least} to {most}"
            raise InputError(option, found=repr(value), expected=f"a whole number {limit}")

    return check


def bits_of_a_budget(option: str, value: str) -> None:
    """Effective bits, above 0 and at most 64: more than any LM takes, its header included."""
    if not re.fullmatch(NUMBER, value) or not 0.0 < float(value) <= 64.0:
        expected = "a number of effective bits, above 0 and at most 64, such as 2.0"
        raise InputError(option, found=repr(value), expected=expected)


def numbers(option: str, value: str) -> None:
    """Numbers from 0 on."""
    for word in value.split():
        if not re.fullmatch(NUMBER, word):
            raise InputError(option, found=repr(word), expected="numbers from 0 on")


def choice(*known: str) -> Check:
    """One of the known words."""

    def check(option: str, value: str) -> None:
        if value not in known:
            raise InputError(f"{option} {value} is unknown", todo=near_matches(value, known))

    return check


def choices(*known: str) -> Check:
    """One or more of the known words, none twice."""

    def check(option: str, value: str) -> None:
        words = value.split()
        for word in words:
            choice(*known)(option, word)
            if words.count(word) > 1:
                raise InputError(f"{option} names {word} twice")

    return check


def path(option: str, value: str, also: str = "") -> None:
    """A path that the shell and the host's scripts leave whole; ``also``: characters not in it."""
    found = SHELL_CHARACTERS.search(value) or (re.search(f"[{also}]", value) if also else None)
    sign = found.group() if found else "-" if value.startswith("-") else None
    if sign is not None:
        raise InputError(
            option,
            found=f"{'a space' if sign == ' ' else repr(sign)} in {value!r}",
            expected="letters, digits and / . _ - = +, which the host's scripts leave whole",
            todo="rename it, or make a link with such a name",
        )


def name(option: str, value: str) -> None:
    """A name of files or folders."""
    path(option, value, also="/")


def text_path(option: str, value: str) -> None:
    """A path that stands in the host's options of the form path,name,type."""
    path(option, value, also=",")


def checkpoint_path(option: str, value: str) -> None:
    """A path that stands in the host's options of the form file:source:target."""
    path(option, value, also=":")


def checkpoint(option: str, value: str) -> None:
    """A name that the host gives to checkpoints of a training."""
    if not CHECKPOINT.fullmatch(value):
        known = ("valid.loss.best.pth", "valid.loss.ave.pth", "valid.acc.ave.pth", "latest.pth")
        raise InputError(
            f"{option} {value} is no name of a checkpoint", todo=near_matches(value, known)
        )


def file(option: str, value: str) -> None:
    """A file that is there."""
    path(option, value)
    need_file(Path(value), option)


def config(option: str, value: str) -> None:
    """A YAML file of options that is there."""
    file(option, value)
    read_yaml(value)


YES_NO = choice("true", "false")
CHECKS: Dict[str, Check] = {
    **dict.fromkeys(("stage", "stop_stage", "ngpu", "max_tokens"), whole(0)),
    **dict.fromkeys(("sensitivity_tokens", "hessian_tokens"), whole(0)),
    **dict.fromkeys(("nj", "inference_nj", "threads", "nbpe", "group_size"), whole(1)),
    **dict.fromkeys(("force", "no_train", "train_lm", "mini"), YES_NO),
    **dict.fromkeys(("train_config", "nas_config", "inference_config"), config),
    **dict.fromkeys(("lm_config", "mpq_config", "asr_config", "decode_config"), config),
    **dict.fromkeys(("lm_train_text", "lm_dev_text", "lm_test_text"), text_path),
    **dict.fromkeys(("quantized_lm", "inference_asr"), checkpoint),
    **dict.fromkeys(("tag", "fp_inference_tag"), name),
    **dict.fromkeys(("lm_exp", "inference_lm"), checkpoint_path),
    **dict.fromkeys(("expdir", "asr_exp", "inference_asr_model"), path),
    **dict.fromkeys(("data_feats", "ref_text"), text_path),
    "seed": whole(0, 2**32 - 2),
    "budget": bits_of_a_budget,
    "lm_weights": numbers,
    "bits": choices(*map(str, QUANTIZED_BITS), "16"),
    "uniform_bits": choice(*map(str, BITS)),
    "grid": choice(*GRIDS),
    "tying": choice(*TYINGS),
    "lm_type": choice("rnn", "transformer"),
    "sensitivity": choices(*SENSITIVITIES),
    "token_type": choice("char", "bpe", "word"),
    "score_unit": choice("word", "char"),
}
# No default, or one that the script fills in.
MAY_BE_EMPTY = {
    *("tag", "lm_type", "lm_train_text", "lm_dev_text", "lm_test_text", "bits", "grid", "tying"),
    *("group_size", "nas_config", "train_config", "lm_args", "asr_exp", "test_sets", "config"),
    *("inference_asr_model", "inference_config", "inference_args", "inference_nj", "lm_exp"),
    *("fp_inference_tag", "data_root", "annotations", "lm_config", "mpq_config", "asr_config"),
    *("decode_config", "budget", "lm_weights"),
}


def check_values(options: Options, optional: Iterable[str] = MAY_BE_EMPTY) -> None:
    """Check every option for itself; raises InputError."""
    for key, value in options.items():
        option = f"--{key}"
        if not value.strip():
            if value or key not in optional:
                raise InputError(f"{option} is empty", todo="give a value, or leave the option out")
        elif key in CHECKS:
            CHECKS[key](option, value)


def need_file(wanted: Path, option: str) -> None:
    """Raise InputError, with names that are spelt like it, unless the file is there."""
    if wanted.is_dir():
        raise InputError(f"{option}: {wanted} is a folder", expected="a file")
    if not wanted.is_file():
        there = names_in(wanted.parent, Path.is_file)
        hint = near_matches(str(wanted), there) if there else f"no files in {wanted.parent}"
        raise InputError(f"no {wanted}; give {option}", todo=hint)


def names_in(folder: Path, wanted: Callable[[Path], bool]) -> List[str]:
    """Paths in a folder for which ``wanted`` holds, in order; none if there is no folder."""
    return [str(p) for p in sorted(folder.iterdir()) if wanted(p)] if folder.is_dir() else []
