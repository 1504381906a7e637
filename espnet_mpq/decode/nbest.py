"""N-best lists as the host's decode directories, JSON lines and Kaldi's archives hold them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy

from espnet_mpq.errors import InputError
from espnet_mpq.io import atomic_write, read_lines

SCORE = "score"  # the first pass' own total, where a list has one
_RANK_FOLDER = re.compile(r"([1-9]\d*)best_recog")
_TENSOR = re.compile(r"tensor\(\s*([^,)\s]+)[^)]*\)")  # as the host prints scores
KALDI_COSTS = ("acwt", "lmwt.nolm", "lmwt.withlm", "lmwt")
_N_LISTED = 5


@dataclasses.dataclass(frozen=True)
class NbestList:
    """The hypotheses of one utterance in the order of the first pass; may be empty.

    Attributes:
        utt: the utterance.
        texts: one transcript a hypothesis, words separated by blanks; "" is an empty one.
        scores: part -> float64 (n,), higher is better; ``SCORE`` is the total of the first pass.
        tokens: the first pass' tokens, separated by blanks; None where they are not known.
        ref: the reference, where the file holds it.
    """

    utt: str
    texts: List[str]
    scores: Dict[str, numpy.ndarray]
    tokens: Optional[List[str]] = None
    ref: Optional[str] = None

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self) -> numpy.ndarray:
        """Tokens of the first pass of every hypothesis, or words where they are not known."""
        return numpy.array([len(x.split()) for x in self.tokens or self.texts], dtype=float)


def read_nbest(path: Union[str, Path]) -> List[NbestList]:
    """Read n-best lists in any of the three forms.

    * A folder of the host: ``logdir/output.*/{N}best_recog/{text,score[,token]}``, or the
      ``{N}best_recog`` folders themselves (merged).
    * A folder of Kaldi: ``words_text`` (``utt-N words``) beside costs of the same keys (``acwt``,
      ``lmwt.nolm``, ``lmwt.withlm`` or ``lmwt``; a score is minus a cost), or ``archives.*``
      of such.
    * A file of JSON lines (.gz too): ``{"id", "hyps": [{"text"[, "score", "scores": {part: x},
      "token"]}, ...][, "ref"]}``.

    Raises:
        InputError: no such files, files that do not belong together, an utterance twice, a score
            that is no finite number.
    """
    path = Path(path)
    if path.is_dir():
        lists = _read_folder(path)
    elif path.is_file():
        lists = _read_jsonl(path)
    else:
        raise InputError(f"there is no n-best file or folder {path}")
    if not lists:
        raise InputError(f"{path} has no utterance")
    _check(path, lists)
    return lists


def _check(path: Path, lists: Sequence[NbestList]) -> None:
    seen, twice = set(), []
    for one in lists:
        (twice.append if one.utt in seen else seen.add)(one.utt)
    if twice:
        raise InputError(
            f"{path} has utterances more than once",
            found=listed(twice),
            todo="keep one n-best list for each utterance",
        )
    parts = [set(one.scores) for one in lists if len(one)]
    for one in lists:
        if len(one) and set(one.scores) != parts[0]:
            raise InputError(
                f"{path}: the lists do not have the same scores",
                found=f"{sorted(one.scores)} in {one.utt}",
                expected=f"{sorted(parts[0])} as in the first list",
            )
    bad = [
        f"{name} {values[rank]} of {one.utt}, hypothesis {rank + 1}"
        for one in lists
        for name, values in one.scores.items()
        for rank in numpy.flatnonzero(~numpy.isfinite(values))
    ]
    if bad:
        raise InputError(
            f"{path} has scores that are no finite numbers",
            found=listed(bad, "; "),
            todo="decode these utterances again, or remove these hypotheses",
        )


def _read_folder(path: Path) -> List[NbestList]:
    for folder in (path, path / "logdir"):
        jobs = _numbered(folder, "output.")
        if jobs:
            lists = [one for job in jobs for one in _read_ranks(job)]
            if lists:
                return lists
    if any(_RANK_FOLDER.fullmatch(p.name) for p in path.iterdir()):
        return _read_ranks(path)
    jobs = _numbered(path, "archives.") or _numbered(path, "")
    if (path / "words_text").is_file():
        jobs = [path]
    if any((job / "words_text").is_file() for job in jobs):
        return [one for job in jobs for one in _read_kaldi(job)]
    raise InputError(
        f"{path} holds no n-best lists",
        found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder",
        expected="logdir/output.*/1best_recog or 1best_recog (the host's, decoded with nbest: N), "
        "or words_text (Kaldi's)",
        todo="decode with nbest: 10 or more in the configuration of the decoder",
    )


def _numbered(folder: Path, prefix: str) -> List[Path]:
    """Folders named prefix and a number, in the order of the numbers."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and p.name.startswith(prefix)]
    found = [p for p in found if p.name[len(prefix) :].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[len(prefix) :]))


def _read_ranks(folder: Path) -> List[NbestList]:
    """One job of the host: {N}best_recog folders."""
    ranks = [p for p in folder.iterdir() if _RANK_FOLDER.fullmatch(p.name) and p.is_dir()]
    ranks.sort(key=lambda p: int(_RANK_FOLDER.fullmatch(p.name)[1]))
    has_tokens = bool(ranks) and all((rank / "token").is_file() for rank in ranks)
    found: Dict[str, list] = {}
    for rank in ranks:
        texts = _read_pairs(rank / "text")
        scores = _read_pairs(rank / "score")
        tokens = _read_pairs(rank / "token") if has_tokens else texts
        for name, other in (("score", scores), ("token", tokens)):
            _same_utterances(rank / "text", texts, rank / name, other)
        for utt, text in texts.items():
            score = _number(scores[utt], rank / "score", utt)
            found.setdefault(utt, []).append((text, score, tokens[utt]))
    return [
        NbestList(
            utt,
            [text for text, _, _ in hyps],
            {SCORE: numpy.array([score for _, score, _ in hyps], dtype=float)},
            [tokens for _, _, tokens in hyps] if has_tokens else None,
        )
        for utt, hyps in found.items()
    ]


def _read_kaldi(folder: Path) -> List[NbestList]:
    """One archive: lines of `utt-N ...`."""
    words = folder / "words_text"
    texts = _read_pairs(words)
    costs = {name: _read_pairs(folder / name) for name in KALDI_COSTS if (folder / name).is_file()}
    if not costs:
        raise InputError(f"{folder} has no scores", expected=f"one of {', '.join(KALDI_COSTS)}")
    for name, other in costs.items():
        _same_utterances(words, texts, folder / name, other)
    ranks: Dict[str, List[Tuple[int, str]]] = {}
    for key in texts:
        utt, dash, rank = key.rpartition("-")
        if not dash or not utt or not rank.isdecimal():
            raise InputError(f"{words}: a key of an n-best list", found=key, expected="utt-N")
        ranks.setdefault(utt, []).append((int(rank), key))
    lists = []
    for utt, numbered in ranks.items():
        keys = [key for _, key in sorted(numbered)]
        scores = {
            name: numpy.array([-_number(values[key], folder / name, key) for key in keys])
            for name, values in costs.items()
        }
        lists.append(NbestList(utt, [texts[key] for key in keys], scores))
    return lists


def _same_utterances(path: Path, ours: Dict, other_path: Path, theirs: Dict) -> None:
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise InputError(
            f"{path} and {other_path} are not of the same utterances",
            found=f"only in one of them: {listed(odd)}",
            todo="decode these utterances again",
        )


def _read_pairs(path: Path) -> Dict[str, str]:
    """key -> rest of the line, in the order of the file."""
    pairs: Dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        key, *rest = line.split(maxsplit=1) or [""]
        if not key:
            continue
        if key in pairs:
            raise InputError(f"{path}, line {number}: {key} is there already")
        pairs[key] = " ".join(rest[0].split()) if rest else ""
    return pairs


def _number(text: str, path: Path, key: str) -> float:
    match = _TENSOR.fullmatch(text)
    try:
        return float(match[1] if match else text)
    except ValueError:
        raise InputError(f"{path}: the score of {key}", found=repr(text)) from None


def _read_jsonl(path: Path) -> List[NbestList]:
    lists = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            lists.append(_from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number} is no n-best list",
                found=f"{type(error).__name__}: {error}",
                expected='{"id": ..., "hyps": [{"text": ..., "score": ...}, ...]}',
            ) from error
    return lists


def _from_json(value: dict) -> NbestList:
    hyps = value["hyps"]
    scores: Dict[str, list] = {}
    for hyp in hyps:
        parts = {**hyp.get("scores", {}), **({SCORE: hyp[SCORE]} if SCORE in hyp else {})}
        for name, score in parts.items():
            scores.setdefault(name, []).append(math.nan if score is None else float(score))
    if any(len(values) != len(hyps) for values in scores.values()):
        raise ValueError(f"some hypotheses of {value['id']} lack a score")
    if not all(isinstance(hyp["text"], str) for hyp in hyps):
        raise TypeError("text is a string")
    has_tokens = bool(hyps) and all("token" in hyp for hyp in hyps)
    return NbestList(
        str(value["id"]),
        [" ".join(hyp["text"].split()) for hyp in hyps],
        {name: numpy.array(values, dtype=float) for name, values in scores.items()},
        [hyp["token"] for hyp in hyps] if has_tokens else None,
        value.get("ref"),
    )


def listed(names: Sequence[str], between: str = ", ") -> str:
    """The first of some names, and how many there are."""
    more = f"{between}... ({len(names)} in all)" if len(names) > _N_LISTED else ""
    return between.join(names[:_N_LISTED]) + more


def write_best(folder: Path, results: Sequence) -> None:
    """The best hypotheses as the host writes them: text, score and, where known, token.

    Args:
        results: rescore.Rescored, one an utterance. One without hypothesis gets an empty text
            and the score -inf.
    """
    texts, scores, tokens = [], [], []
    for result in results:
        one = result.nbest
        best = int(result.order[0]) if len(one) else None
        total = -math.inf if best is None else result.totals[best]
        texts.append(f"{one.utt} {result.best_text}".rstrip())
        scores.append(f"{one.utt} tensor({total:.4f})")
        tokens.append(f"{one.utt} {one.tokens[best]}".rstrip() if one.tokens else one.utt)
    atomic_write(folder / "text", "\n".join(texts) + "\n")
    atomic_write(folder / "score", "\n".join(scores) + "\n")
    if any(result.nbest.tokens for result in results):
        atomic_write(folder / "token", "\n".join(tokens) + "\n")
