"""Sentences: text files read and their format guessed, token ids, held-out parts, batches."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.io import atomic_write, read_lines

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("espnet_mpq")
TEXT_FORMATS = ("auto", "plain", "kaldi")
VALID_FRACTION, VALID_MAX_SENTENCES = 0.05, 1000
_MANY = 20  # lines of plain text of which some begin with the same word
_JOINED = re.compile(r"[^\W_][-_]+[^\W_]")  # spk-a, dev_clean: letters or digits joined
Sentences = Sequence[Tuple[str, str]]  # (name of the utterance, its words)


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """Sentences as token ids.

    Attributes:
        utts: one name per sentence.
        ids: one 1-D int64 tensor per sentence, without sos and eos.
        n_words: words per sentence (separated by white space, sentence end not counted).
        n_oov_tokens: tokens that became <unk>; n_oov_words: words with at least one of these.
    """

    utts: List[str]
    ids: List[torch.Tensor]
    n_words: List[int]
    n_oov_tokens: int
    n_oov_words: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """Predicted tokens: all ids and one sentence end per sentence."""
        return sum(len(x) + 1 for x in self.ids)

    def sample(self, max_tokens: Optional[int], seed: int = 0) -> "TokenizedText":
        """A random choice of whole sentences, in file order, of at most ``max_tokens`` tokens.

        At least one sentence stays; None or a large number keeps all. The OOV counts stay
        those of the whole text.
        """
        if not max_tokens or max_tokens >= self.n_tokens:
            return self
        order = list(range(len(self.ids)))
        random.Random(seed).shuffle(order)
        chosen, total = [], 0
        for i in order:
            if total + len(self.ids[i]) + 1 <= max_tokens or not chosen:
                chosen.append(i)
                total += len(self.ids[i]) + 1
        chosen.sort()
        return dataclasses.replace(
            self,
            utts=[self.utts[i] for i in chosen],
            ids=[self.ids[i] for i in chosen],
            n_words=[self.n_words[i] for i in chosen],
        )


def read_text(path: Union[str, Path], text_format: str = "auto") -> List[Tuple[str, str]]:
    """`read_text_and_format` without the format."""
    return read_text_and_format(path, text_format)[0]


def read_text_and_format(
    path: Union[str, Path], text_format: str = "auto"
) -> Tuple[List[Tuple[str, str]], str]:
    """Read sentences: plain text (one per line) or the host's ``utt text`` lines; .gz too.

    ``auto`` takes ``utt text`` when the first words of the lines differ and nearly all look
    like identifiers (see `guess_format`); a warning says when that is not clear. White space
    around a sentence is no part of it, as in the host. Empty sentences are left out and counted
    in a warning; names that come again are kept, with a warning. Plain sentences are named by
    their line number.

    Returns:
        (name, sentence) pairs, and the format that was read: "plain" or "kaldi".

    Raises:
        InputError: as `io.read_lines`, or no sentence in it.
    """
    path = Path(path)
    if text_format not in TEXT_FORMATS:
        raise InputError(
            f"unknown text format {text_format!r}", todo=near_matches(text_format, TEXT_FORMATS)
        )
    lines = [line.strip() for line in read_lines(path)]
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line]
    if text_format == "auto":
        text_format, doubt = guess_format([line for _, line in numbered])
        if doubt:
            LOG.warning(
                "%s: read as %s text, but %s: give --text_format plain or kaldi",
                *(path, text_format, doubt),
            )
        else:
            LOG.info("%s: read as %s text (--text_format changes this)", path, text_format)
    if text_format == "kaldi":
        named = [(n, *(line.split(maxsplit=1) + [""])[:2]) for n, line in numbered]
        _warn_of_repeated_names(path, named)
        sentences = [(utt, text) for _, utt, text in named if text]
    else:
        sentences = [(f"line{n:07d}", line) for n, line in numbered]
    n_empty = len(lines) - len(sentences)
    if n_empty:
        LOG.warning("%s: %d of %d lines are empty, left out", path, n_empty, len(lines))
    if not sentences:
        raise InputError(
            f"{path} has no sentence",
            found=f"{len(lines)} lines, all empty" if lines else "an empty file",
            expected="one sentence a line, or `utt text` lines",
            todo="" if text_format == "plain" else "check --text_format",
        )
    return sentences, text_format


def _warn_of_repeated_names(path: Path, named: Sequence[Tuple[int, str, str]]) -> None:
    first: Dict[str, int] = {}
    again = [(n, utt) for n, utt, _ in named if first.setdefault(utt, n) != n]
    if again:
        number, utt = again[0]
        LOG.warning(
            "%s: %d of %d names of utterances are there already (line %d: %s, as in line %d); all "
            "sentences are kept",
            *(path, len(again), len(named), number, shown(utt), first[utt]),
        )


def guess_format(lines: Sequence[str]) -> Tuple[str, str]:
    """("kaldi" or "plain", why that may be wrong or ""), judged by the first words of all lines.

    "kaldi": 90% of them look like identifiers, letters or signs with digits or parts joined by -
    or _, and most differ; or they are distinct numbers that rise or are of one width.
    """
    first = [line.split(maxsplit=1)[0] for line in lines]
    if not first:
        return "plain", ""
    n_distinct = len(set(first))
    repeated = "" if n_distinct == len(first) else "some first words are there more than once"
    several = len(first) > 1
    if all(word.isdecimal() for word in first):
        # Values as text: int() refuses very long ones.
        numbers = [(len(word), word) for word in (word.lstrip("0") for word in first)]
        rising = all(a < b for a, b in zip(numbers, numbers[1:]))
        one_width = len({len(word) for word in first}) == 1
        padded = one_width and any(word.startswith("0") for word in first)
        distinct = len(first) - n_distinct < 0.01 * len(first)
        # Two sentences may well begin with years; one number may begin any sentence.
        if several and distinct and (padded or (len(first) > 2 and (rising or one_width))):
            return "kaldi", repeated or ("" if rising or padded else "its numbers do not rise")
        return "plain", "every line begins with a number"
    n_like_ids = sum(_looks_like_id(word, several) for word in first)
    # Twice the same text is still text with names.
    mostly_distinct = n_distinct == len(first) or n_distinct >= max(2, len(first) / 2)
    if n_like_ids >= 0.9 * len(first) and mostly_distinct:
        if n_like_ids < 0.98 * len(first):
            repeated = repeated or "some first words do not look like names"
        elif not any(char.isdigit() for word in first for char in word):
            repeated = repeated or "the first words, taken for names, may be joined words"
        return "kaldi", repeated
    if n_like_ids >= 0.5 * len(first):
        return "plain", "many first words look like names of utterances"
    if all(_ends_in_name(line) for line in lines):
        return "plain", "every line ends in a word in brackets, as in trn files"
    if n_distinct == len(first) >= _MANY and any(len(line.split()) > 1 for line in lines):
        return "plain", "no two lines begin with the same word, as if these were names"
    return "plain", ""


def share_of_ids(words: Sequence[str]) -> float:
    """The share of ``words`` that look like names of utterances (numbers do, too), 0 to 1."""
    return sum(word.isdecimal() or _looks_like_id(word, True) for word in words) / len(words)


def _looks_like_id(word: str, joined: bool) -> bool:
    """``joined``: whether letters joined by - or _ are enough (one may begin any sentence)."""
    has_digit = any(c.isdigit() for c in word)
    if has_digit and any(not c.isdigit() for c in word):
        return True
    return joined and _JOINED.search(word) is not None


def _ends_in_name(line: str) -> bool:
    last = line.rsplit(maxsplit=1)[-1]
    return last.startswith("(") and last.endswith(")") and len(last) > 2


def shown(word: str) -> str:
    """A word for people: with codes in place of characters that cannot be seen."""
    return word if word.isprintable() else ascii(word)


def with_host_names(sentences: Sentences) -> List[Tuple[str, str]]:
    """The sentences under names that a host can take: theirs, or else their numbers, all of them.

    A host uses names as keys, as parts of file names and in titles of figures, so they must
    differ, be printable and short, and hold no "/" or "$" (which begins a formula).
    """
    names = [utt for utt, _ in sentences]
    if len(set(names)) == len(names) and all(_is_host_name(name) for name in names):
        return list(sentences)
    LOG.info("names of utterances are replaced by numbers: some repeat or are no file names")
    return [(f"sentence{n:07d}", text) for n, (_, text) in enumerate(sentences, 1)]


def _is_host_name(name: str) -> bool:
    if not name.isprintable() or len(name.encode("utf-8")) > 200:
        return False
    return len(name.split()) == 1 and not set("/$") & set(name) and name not in (".", "..")


def write_text(path: Union[str, Path], sentences: Sentences) -> None:
    """Write `utt text` lines for a host.

    Raises:
        InputError: a sentence that the host would not read back as it is (empty, of several
            lines, or with white space around it), with its number; as `io.atomic_write`.
    """
    for number, (utt, text) in enumerate(sentences, 1):
        line = f"{utt} {text}"
        if line.rstrip().split(maxsplit=1) != [utt, text] or "\n" in line or "\r" in line:
            raise InputError(
                f"sentence {number} cannot be a line of {path}",
                found=repr(line[:60]),
                expected="a name and words, without line ends",
            )
    atomic_write(path, "".join(f"{utt} {text}\n" for utt, text in sentences))


def split_valid(
    sentences: Sentences, seed: int, most: int = VALID_MAX_SENTENCES
) -> Tuple[list, list]:
    """(train, valid): 5 % of the sentences, at most ``most``, at least one, are held out."""
    if len(sentences) < 2:
        raise InputError(
            "the text has one sentence", expected="more, or a text of its own with --valid_text"
        )
    order = list(range(len(sentences)))
    random.Random(seed).shuffle(order)
    n_valid = min(max(1, int(VALID_FRACTION * len(order))), most)
    held = set(order[:n_valid])
    train = [s for i, s in enumerate(sentences) if i not in held]
    return train, [s for i, s in enumerate(sentences) if i in held]


def batches(
    text: TokenizedText,
    special_ids: Mapping[str, int],
    *,
    batch_size: int = 32,
    max_batch_tokens: int = 8192,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets, mask) in the order of ``text``.

    ``special_ids`` holds the ids of "sos" and "eos". inputs (B, T) int64 start with sos, targets
    (B, T) int64 end with eos, mask (B, T) bool marks predicted tokens; padding is id 0. B is at
    most ``batch_size`` and small enough that B * T <= ``max_batch_tokens`` (one sentence may be
    longer).
    """
    sos, eos = special_ids["sos"], special_ids["eos"]
    group: List[torch.Tensor] = []
    longest = 0
    for ids in text.ids:
        length = len(ids) + 1
        too_wide = (len(group) + 1) * max(longest, length) > max_batch_tokens
        if group and (len(group) == batch_size or too_wide):
            yield _pad(group, sos, eos)
            group, longest = [], 0
        group.append(ids)
        longest = max(longest, length)
    if group:
        yield _pad(group, sos, eos)


def _pad(group: List[torch.Tensor], sos: int, eos: int):
    import torch

    width = max(len(ids) for ids in group) + 1
    inputs = torch.zeros(len(group), width, dtype=torch.long)
    targets = torch.zeros(len(group), width, dtype=torch.long)
    mask = torch.zeros(len(group), width, dtype=torch.bool)
    for row, ids in enumerate(group):
        n = len(ids)
        inputs[row, 0] = sos
        inputs[row, 1 : n + 1] = ids
        targets[row, :n] = ids
        targets[row, n] = eos
        mask[row, : n + 1] = True
    return inputs, targets, mask
