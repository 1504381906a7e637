"""Hypotheses and references: Kaldi `utt words`, NIST trn and plain lines, paired by utterance."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.evaluate.scoring import AS_HOST, Scoring
from espnet_mpq.io import read_lines
from espnet_mpq.text import share_of_ids, shown

LOG = logging.getLogger("espnet_mpq")
FILE_FORMATS = ("auto", "kaldi", "trn", "plain")
NAMED = ("kaldi", "trn")  # their lines name the utterance
_N_LISTED = 5

Transcripts = Dict[str, List[str]]
Entry = Tuple[int, str, List[str]]  # line number, utterance, words


def read_transcripts(
    path: Union[str, Path], file_format: str = "auto", scoring: Scoring = AS_HOST
) -> Transcripts:
    """Read one transcript a line: utterance -> its tokens, in the order of the file.

    Errors as `read_together`.
    """
    return read_together({"": path}, file_format, scoring)[0][""]


def read_together(
    paths: Dict[str, Union[str, Path]], file_format: str = "auto", scoring: Scoring = AS_HOST
) -> Tuple[Dict[str, Transcripts], Dict[str, str]]:
    """Read files of the same utterances (references, hypotheses of several systems).

    ``kaldi`` lines are `utt words...`, ``trn`` lines `words... (utt)`; both without words are
    empty transcripts, blank lines are left out. ``plain`` lines are words alone, paired by line
    number; a blank one is an empty transcript. ``auto`` takes the one reading, kaldi or trn for
    each file, in which all files have the same utterances, each once; never plain. Where several
    do, the one whose utterances look like names of utterances, with a warning.

    Returns:
        role -> (utterance -> tokens), and role -> format.

    Raises:
        InputError: as `io.read_lines`; no transcript, a line without its utterance, the same
            utterance twice, another kind of file (ctm, stm, JSON), or two formats that fit.
    """
    if file_format not in FILE_FORMATS:
        raise InputError(
            f"unknown format {file_format!r}", todo=near_matches(file_format, FILE_FORMATS)
        )
    lines = {role: _read(path, file_format) for role, path in paths.items()}
    if file_format == "auto":
        formats = _choose(paths, lines)
    else:
        formats = dict.fromkeys(paths, file_format)
    found = {}
    for role, path in paths.items():
        entries = _entries(lines[role], formats[role], path)
        _check_distinct(entries, path)
        found[role] = {utt: scoring.tokens(words) for _, utt, words in entries}
    return found, formats


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
                todo="score the list that was decoded, and decode it to the end "
                "(lines without names: --text_format plain)",
            )
    utts = sorted(ref)
    refs = [ref[utt] for utt in utts]
    if not any(refs):
        raise InputError("the reference has no word", found=f"{len(refs)} empty transcripts")
    return utts, refs, {name: [hyp[utt] for utt in utts] for name, hyp in hyps.items()}


def _read(path, file_format: str) -> List[Tuple[int, str]]:
    lines = list(enumerate(read_lines(path), 1))
    if file_format != "plain":
        lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path} has no transcript", expected="`utt text` or `text (utt)` lines")
    if file_format == "auto":
        other = _other_kind([line for _, line in lines])
        if other:
            raise InputError(
                f"{path} looks like a {other} file",
                found=repr(lines[0][1].strip()[:60]),
                expected="one transcript a line: `utt words` or `words (utt)`",
                todo="convert it, or give --text_format if it is what is expected",
            )
    return lines


def _other_kind(lines: Sequence[str]) -> Optional[str]:
    """ctm, stm or JSON if every line (but comments) looks like it."""
    fields = [line.split() for line in lines if not line.lstrip().startswith(";;")]
    if not fields:
        return None
    if all(words[0].startswith(("{", "[{")) for words in fields):
        return "JSON"
    # ctm: file channel start duration word [confidence]; stm: file channel speaker start end ...
    if all(len(x) in (5, 6) and _are_times(x[2:4]) for x in fields):
        return "ctm"
    if all(len(x) >= 5 and _are_times(x[3:5]) for x in fields):
        return "stm"
    return None


def _are_times(words: Sequence[str]) -> bool:
    return all("." in word and word.replace(".", "", 1).isdecimal() for word in words)


def _entry(number: int, line: str, file_format: str) -> Optional[Entry]:
    """A line taken apart; None if it is no such line."""
    if file_format == "plain":
        return number, f"line{number:07d}", line.split()
    if file_format == "kaldi":
        utt, *words = line.split()
        return number, utt, words
    line = line.rstrip()
    start = line.rfind("(")
    utt = line[start + 1 : -1]
    if start < 0 or not line.endswith(")") or len(utt.split()) != 1 or ")" in utt:
        return None
    return number, utt, line[:start].split()


def _entries(lines: Sequence[Tuple[int, str]], file_format: str, path) -> List[Entry]:
    entries = []
    for number, line in lines:
        entry = _entry(number, line, file_format)
        if entry is None:
            raise InputError(
                f"{path}, line {number}",
                found=repr(line.strip()[-40:]),
                expected="words followed by (utterance), as in trn files",
            )
        entries.append(entry)
    return entries


def _check_distinct(entries: Sequence[Entry], path) -> None:
    first: Dict[str, int] = {}
    again = []
    for number, utt, _ in entries:
        if utt in first:
            again.append(f"{shown(utt)} (lines {first[utt]} and {number})")
        first.setdefault(utt, number)
    if again:
        raise InputError(
            f"{path} has utterances more than once",
            found=_listed(again),
            todo="keep one line for each utterance (lines without names: --text_format plain)",
        )


def _choose(paths: Dict[str, object], lines: Dict[str, list]) -> Dict[str, str]:
    """role -> format, of those in which every file has the same utterances, each once."""
    fits = {role: _names_by_format(content) for role, content in lines.items()}
    agreeing = []
    for formats in itertools.product(*(fits[role] for role in paths)):
        names = [fits[role][name] for role, name in zip(paths, formats)]
        distinct = all(len(set(x)) == len(x) for x in names)
        if distinct and all(set(x) == set(names[0]) for x in names):
            agreeing.append((share_of_ids(names[0]), formats))
    if not agreeing:  # `pair` says what differs
        formats = [_likeliest(fits[role]) for role in paths]
    else:
        agreeing.sort(reverse=True)
        share, formats = agreeing[0]
        if len(agreeing) > 1:
            _doubt(list(paths.values()), agreeing)
        elif share < 0.5 and formats[0] == "kaldi":
            LOG.warning(
                "the first word of every line is taken for the name of its utterance (%s): for "
                "lines without names give --text_format plain",
                ", ".join(next(iter(fits.values()))["kaldi"][:2]),
            )
    chosen = dict(zip(paths, formats))
    for role, path in paths.items():
        shown = {"kaldi": "`utt words`", "trn": "`words (utt)`"}[chosen[role]]
        LOG.info("%s: read as %s lines, %s (--text_format)", path, chosen[role], shown)
    return chosen


def _names_by_format(lines: Sequence[Tuple[int, str]]) -> Dict[str, List[str]]:
    """The formats that every line has, with the names of its utterances."""
    found = {}
    for file_format in NAMED:
        entries = [_entry(number, line, file_format) for number, line in lines]
        if None not in entries:
            found[file_format] = [entry[1] for entry in entries]
    return found


def _likeliest(fits: Dict[str, List[str]]) -> str:
    return max(fits, key=lambda name: (len(set(fits[name])), share_of_ids(fits[name])))


def _doubt(files: Sequence[object], agreeing) -> None:
    """Several readings give the same utterances everywhere: warn, or ask."""
    (share, formats), (second, others) = agreeing[:2]
    names = ", ".join(map(str, files))
    if share >= 0.9 and second <= 0.5:
        LOG.warning(
            "%s: also readable as %s, read as %s: its utterances look like names (--text_format)",
            *(names, "/".join(others), "/".join(formats)),
        )
        return
    raise InputError(
        f"two formats fit {names}",
        found=f"{'/'.join(formats)} and {'/'.join(others)}",
        todo="give --text_format: kaldi for `utt words`, trn for `words (utt)`",
    )


def _listed(utts: Sequence[str]) -> str:
    more = f", ... ({len(utts)} in all)" if len(utts) > _N_LISTED else ""
    return ", ".join(map(shown, utts[:_N_LISTED])) + more
