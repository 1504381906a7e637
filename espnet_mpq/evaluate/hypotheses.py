"""Hypotheses and references: Kaldi `utt text` and NIST trn files, paired by utterance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

from espnet_mpq.errors import InputError
from espnet_mpq.io import read_lines

FILE_FORMATS = ("auto", "kaldi", "trn")
UNITS = ("word", "char")
_TRN_LINE = re.compile(r"^(?P<words>.*?)\s*\((?P<utt>[^()\s]+)\)\s*$")
_N_LISTED = 5

Transcripts = Dict[str, List[str]]


def read_transcripts(
    path: Union[str, Path], file_format: str = "auto", unit: str = "word"
) -> Transcripts:
    """Read one transcript a line, in the order of the file.

    ``kaldi`` lines are `utt words...`, ``trn`` lines are `words... (utt)`; ``auto``
    takes trn when every line ends in `(utt)`. A line with the utterance alone is an
    empty transcript. ``unit`` "char" splits words into characters and keeps the
    blank between words as `<space>`, as the host's character error rate does.

    Returns:
        utterance -> list of words (or characters).

    Raises:
        InputError: missing, empty or non-UTF-8 file, a line without its utterance,
            or the same utterance twice.
    """
    path = Path(path)
    for name, value, known in (("format", file_format, FILE_FORMATS), ("unit", unit, UNITS)):
        if value not in known:
            raise InputError(f"unknown {name}", found=repr(value), expected=" or ".join(known))
    lines = _read_lines(path)
    matches = [_TRN_LINE.match(line) for _, line in lines]
    if file_format == "auto":
        file_format = "trn" if all(matches) else "kaldi"

    transcripts: Transcripts = {}
    duplicates = []
    for (number, line), match in zip(lines, matches):
        if file_format == "kaldi":
            utt, *words = line.split()
        elif match:
            utt, words = match["utt"], match["words"].split()
        else:
            raise InputError(
                f"{path}, line {number}",
                found=repr(line.strip()[-40:]),
                expected="words followed by (utterance), as in trn files",
            )
        if utt in transcripts:
            duplicates.append(utt)
        transcripts[utt] = words if unit == "word" else to_characters(words)
    if duplicates:
        raise InputError(
            f"{path} has utterances more than once",
            found=_listed(duplicates),
            todo="keep one line for each utterance",
        )
    return transcripts


def to_characters(words: Sequence[str]) -> List[str]:
    """The characters of the words with `<space>` between two words."""
    return ["<space>" if c == " " else c for c in " ".join(words)]


def pair(
    ref: Transcripts, hyps: Dict[str, Transcripts]
) -> Tuple[List[str], List[List[str]], Dict[str, List[List[str]]]]:
    """Put references and the hypotheses of several systems into one order.

    Returns:
        utterances (sorted), references, system name -> hypotheses; all lists in the
        same order.

    Raises:
        InputError: a system lacks utterances of the reference or has others (up to
            five of each are listed), or the reference has no word at all.
    """
    for name, hyp in hyps.items():
        missing = sorted(ref.keys() - hyp.keys())
        extra = sorted(hyp.keys() - ref.keys())
        if missing or extra:
            raise InputError(
                f"the hypotheses of {name} and the reference are not of the same utterances",
                found="; ".join(
                    f"{what} {_listed(utts)}"
                    for what, utts in (("missing:", missing), ("not in the reference:", extra))
                    if utts
                ),
                expected=f"the {len(ref)} utterances of the reference",
                todo="score the list that was decoded, and decode it to the end",
            )
    utts = sorted(ref)
    refs = [ref[utt] for utt in utts]
    if not any(refs):
        raise InputError("the reference has no word", found=f"{len(refs)} empty transcripts")
    return utts, refs, {name: [hyp[utt] for utt in utts] for name, hyp in hyps.items()}


def _read_lines(path: Path) -> List[Tuple[int, str]]:
    lines = [(n, line) for n, line in enumerate(read_lines(path), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path} has no transcript", expected="`utt text` or `text (utt)` lines")
    return lines


def _listed(utts: Sequence[str]) -> str:
    more = f", ... ({len(utts)} in all)" if len(utts) > _N_LISTED else ""
    return ", ".join(utts[:_N_LISTED]) + more
