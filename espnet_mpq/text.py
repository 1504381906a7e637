"""Sentences: text files read and their format guessed, token ids, held-out parts, batches."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.io import read_lines

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("espnet_mpq")
TEXT_FORMATS = ("auto", "plain", "kaldi")
VALID_FRACTION, VALID_MAX_SENTENCES = 0.05, 1000
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
    """Read sentences: plain text (one per line) or the host's ``utt text`` lines; .gz too.

    ``auto`` takes ``utt text`` when the first words of the lines differ and nearly all look
    like identifiers (see `guess_format`); a warning says when that is not clear. Empty sentences
    are left out and counted in a warning. Plain sentences are named by their line number.

    Raises:
        InputError: no such file, not UTF-8, or no sentence in it.
    """
    path = Path(path)
    if text_format not in TEXT_FORMATS:
        raise InputError(
            f"unknown text format {text_format!r}", todo=near_matches(text_format, TEXT_FORMATS)
        )
    lines = [line.strip() for line in read_lines(path)]
    n_lines = len(lines)
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line]
    if text_format == "auto":
        text_format, mixed = guess_format([line for _, line in numbered])
        if mixed:
            LOG.warning(
                "%s: read as %s text, but the evidence is mixed (first words like ids, repeated "
                "ones, bare numbers): give --text_format plain or kaldi",
                *(path, text_format),
            )
        else:
            LOG.info("%s: read as %s text (--text_format changes this)", path, text_format)
    if text_format == "kaldi":
        pairs = [(line.split(maxsplit=1) + [""])[:2] for _, line in numbered]
        sentences = [(utt, text) for utt, text in pairs if text]
    else:
        sentences = [(f"line{n:07d}", line) for n, line in numbered]
    n_empty = n_lines - len(sentences)
    if n_empty:
        LOG.warning("%s: %d of %d lines are empty, left out", path, n_empty, n_lines)
    if not sentences:
        raise InputError(
            f"{path} has no sentence",
            found=f"{n_lines} lines, all empty" if n_lines else "an empty file",
            expected="one sentence a line, or `utt text` lines",
            todo="" if text_format == "plain" else "check --text_format",
        )
    return sentences


def guess_format(lines: Sequence[str]) -> Tuple[str, bool]:
    """("kaldi" or "plain", whether the evidence is mixed), judged by the first words of all lines.

    "kaldi": under 1% of them are repeated, and they are numbers that rise or are of one width,
    or 90% look like identifiers: letters or signs with digits, or parts joined by - or _.
    """
    first = [line.split(maxsplit=1)[0] for line in lines]
    if not first:
        return "plain", False
    n_repeated = len(first) - len(set(first))
    distinct = n_repeated < 0.01 * len(first)
    # A number or a joined word alone may begin any sentence.
    several = len(first) > 1
    if several and all(word.isdecimal() for word in first):
        numbers = [int(word) for word in first]
        rising = all(a < b for a, b in zip(numbers, numbers[1:]))
        one_width = len({len(word) for word in first}) == 1
        padded = one_width and any(word.startswith("0") for word in first)
        # Two sentences may well begin with years.
        if distinct and (padded or (len(first) > 2 and (rising or one_width))):
            return "kaldi", not (rising or padded) or n_repeated > 0
        return "plain", distinct
    n_like_ids = sum(_looks_like_id(word, several) for word in first)
    if distinct and n_like_ids >= 0.9 * len(first):
        return "kaldi", n_repeated > 0 or n_like_ids < 0.98 * len(first)
    return "plain", n_like_ids >= 0.5 * len(first)


def _looks_like_id(word: str, joined: bool) -> bool:
    has_digit = any(c.isdigit() for c in word)
    if has_digit and any(not c.isdigit() for c in word):
        return True
    return joined and _JOINED.search(word) is not None


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
