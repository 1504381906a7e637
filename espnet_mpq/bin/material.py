"""What a harm is measured on: text for a language model, a folder of speech for a recogniser."""

from __future__ import annotations

import argparse
import logging
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from espnet_mpq.errors import InputError

LOG = logging.getLogger("espnet_mpq")
MAX_TOKENS, MAX_SECONDS = 10000, 120.0  # unless the user says otherwise
EXP_OPTIONS = ("--lm_exp", "--asr_exp", "--exp")
FILE_OPTIONS = ("--lm_file", "--asr_model_file", "--file")


def add_exp_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """--lm_exp or --asr_exp as ``exp``, and the checkpoint as ``file``; config.yaml tells which."""
    parser.add_argument(
        *EXP_OPTIONS,
        dest="exp",
        required=required,
        metavar="DIR",
        help="experiment of the fp LM or recogniser: config.yaml and a checkpoint",
    )
    parser.add_argument(
        *FILE_OPTIONS,
        dest="file",
        metavar="FILE",
        help="checkpoint inside it (default: valid.loss.best.pth of an LM, valid.acc.ave.pth of a"
        " recogniser)",
    )


def add_material_arguments(parser: argparse.ArgumentParser, follows_table: bool = False) -> None:
    """--text, --data and how much of them; ``follows_table``: what is not given is as there."""
    add, table = parser.add_argument, "as the table, else " if follows_table else ""
    add("--text", help="for an LM: text to measure on, plain or `utt text` lines")
    add("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    add(
        "--data",
        metavar="DIR",
        help="for a recogniser: Kaldi-style folder to measure on (wav.scp, text, segments)",
    )
    default = None if follows_table else MAX_TOKENS
    add(
        "--max_tokens",
        type=int,
        default=default,
        help="measure on a random sample of sentences with at most this many tokens, 0 = all"
        f" (default: {table}{MAX_TOKENS}; the standard errors tell whether that is enough)",
    )
    default = None if follows_table else MAX_SECONDS
    add(
        "--max_seconds",
        type=float,
        default=default,
        help="measure on a random sample of utterances of at most this length, 0 = all"
        f" (default: {table}{MAX_SECONDS:g})",
    )


def check_amounts(args: argparse.Namespace) -> None:
    """Raise InputError for amounts below zero."""
    for name in ("max_tokens", "max_seconds"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name}", found=value, expected="at least 0")


class Material(ABC):
    """What a harm of an opened experiment is measured on.

    Attributes:
        exp: the experiment.
        unit: of the harm.
    """

    exp: Any
    unit: str

    @abstractmethod
    def record(self) -> Dict[str, object]:
        """Entries of a provenance that say what was measured on."""

    @abstractmethod
    def inputs(self) -> Dict[str, Dict[str, str]]:
        """Entries of a provenance's ``inputs`` that are no plain files."""

    @abstractmethod
    def judge(self, max_batch_rows: int):
        """The model as Judged on it."""


class TextMaterial(Material):
    """Sentences, for language models."""

    unit = "nats/token"

    def __init__(self, exp, path, text_format: str, max_tokens: int, seed: int):
        self.exp, self.path = exp, path
        self.text_format, self.max_tokens = text_format, max_tokens
        self.text = open_text(exp, path, text_format, max_tokens, seed)

    def record(self) -> Dict[str, object]:
        from espnet_mpq.io import sha256_file

        return {
            "text_sha256": sha256_file(self.path),
            "text_format": self.text_format,
            "max_tokens": self.max_tokens,
            "n_tokens": self.text.n_tokens,
            "n_sentences": len(self.text),
        }

    def inputs(self) -> Dict[str, Dict[str, str]]:
        return {}

    def judge(self, max_batch_rows: int):
        from espnet_mpq.hosts.espnet.lm.judged import judged_lm

        return judged_lm(self.exp, self.text, max_batch_rows)


class SpeechMaterial(Material):
    """Utterances with their transcripts, for recognisers."""

    def __init__(self, exp, folder, max_seconds: float, seed: int):
        from espnet_mpq.hosts.espnet.asr.data import read_speech
        from espnet_mpq.hosts.espnet.asr.judged import heads_of, unit_of

        self.exp, self.folder, self.max_seconds = exp, folder, max_seconds
        self.unit = unit_of(exp.model)
        self.speech = read_speech(
            exp,
            folder,
            max_seconds=max_seconds,
            seed=seed,
            needs_text="decoder" in heads_of(exp.model),
        )

    def record(self) -> Dict[str, object]:
        return {
            "data_sha256": self.speech.sha256,
            "max_seconds": self.max_seconds,
            "unit": self.unit,
            "n_seconds": round(self.speech.seconds, 2),
            "n_sentences": len(self.speech),
        }

    def inputs(self) -> Dict[str, Dict[str, str]]:
        return {"data": {"path": str(self.folder), "sha256": self.speech.sha256}}

    def judge(self, max_batch_rows: int):
        from espnet_mpq.hosts.espnet.asr.judged import judged_asr

        return judged_asr(self.exp, self.speech, max_batch_rows)


def open_material(exp, args: argparse.Namespace, seed: int) -> Material:
    """As the options say; raises InputError where the experiment needs the other of the two."""
    name, other = ("data", "text") if exp.kind == "asr" else ("text", "data")
    _check_options(exp, args, name, other)
    if getattr(args, name) is None:
        raise InputError(f"--{name} is missing", todo="see --help of this command")
    if exp.kind == "asr":
        return SpeechMaterial(exp, args.data, args.max_seconds, seed)
    return TextMaterial(exp, args.text, args.text_format, args.max_tokens, seed)


def open_material_or_of_table(
    exp, args: argparse.Namespace, provenance: Mapping[str, Any]
) -> Optional[Material]:
    """As the options say, else what a sensitivity table was measured on.

    None, with a message where there is a table, if that is not there as it was.
    """
    record = {key: value for key, value in provenance.items() if value is not None}
    name, other = ("data", "text") if exp.kind == "asr" else ("text", "data")
    _check_options(exp, args, name, other)
    given = argparse.Namespace(**vars(args))
    seed = record.get("seed", 0) if args.seed is None else args.seed
    for key, value in (("max_tokens", MAX_TOKENS), ("max_seconds", MAX_SECONDS)):
        if getattr(args, key) is None:
            setattr(given, key, record.get(key, value))
    if getattr(args, name) is not None:
        return open_material(exp, given, seed)
    if not record:
        return None
    path = record.get("inputs", {}).get(name, {}).get("path")
    if path is None or not _is_as_it_was(exp, record, name):
        found = f"the table does not name its {name}"
        if path is not None:
            found = f"{path} is not as it was"
        LOG.warning("%s: give --%s to measure the joint KL", found, name)
        return None
    given.text_format = record.get("text_format", "auto")
    setattr(given, name, path)
    return open_material(exp, given, seed)


def _is_as_it_was(exp, record: Mapping[str, Any], name: str) -> bool:
    from espnet_mpq.io import sha256_file

    source = record["inputs"][name]
    path = Path(source["path"])
    if name == "text":
        return path.is_file() and sha256_file(path) == source.get("sha256")
    if not (path / "wav.scp").is_file():
        return False
    seconds, seed = record.get("max_seconds", MAX_SECONDS), record.get("seed", 0)
    speech = SpeechMaterial(exp, path, seconds, seed).speech
    return speech.sha256 == source.get("sha256")


def _check_options(exp, args: argparse.Namespace, name: str, other: str) -> None:
    if getattr(args, other) is not None:
        kind = "a recogniser" if exp.kind == "asr" else "an LM"
        raise InputError(
            f"{exp.config} describes {kind}",
            found=f"--{other} {getattr(args, other)}",
            expected=f"--{name}",
        )


def open_text(exp, path, text_format: str, max_tokens: int, seed: int):
    """TokenizedText of a random sample of sentences; tokenizes little more than the sample."""
    from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
    from espnet_mpq.text import read_text

    sentences = read_text(path, text_format)
    if max_tokens:
        order = list(range(len(sentences)))
        random.Random(seed).shuffle(order)
        chosen, n_words = [], 0
        for i in order:  # a word is at least one token, so these are enough
            if n_words >= max_tokens:
                break
            chosen.append(i)
            n_words += len(sentences[i][1].split())
        sentences = [sentences[i] for i in sorted(chosen)]
    return tokenize(exp, sentences).sample(max_tokens, seed)
