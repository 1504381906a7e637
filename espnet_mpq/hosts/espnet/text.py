"""Reads text and turns it into token ids exactly as the host does for an LM experiment."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import logging
import random
import re
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch

from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.hosts.espnet.registry import register

LOG = logging.getLogger("espnet_mpq")
TEXT_FORMATS = ("auto", "plain", "kaldi")
_JOINED = re.compile(r"[^\W_][-_]+[^\W_]")  # spk-a, dev_clean: letters or digits joined


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
    lines = [line.strip() for line in _decode(path).split("\n")]
    if lines and not lines[-1]:
        lines.pop()
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


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise InputError(
            f"cannot read the text {path}", found=getattr(error, "strerror", None) or error
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path} is not UTF-8 text",
            found=f"byte 0x{data[error.start]:02x} in line {line}",
            todo="convert it: iconv -f ENCODING -t UTF-8",
        ) from error


def build_tokenizer(args: argparse.Namespace, where: str = "config.yaml"):
    """The host's own preprocessor for these training options: (utt, text) -> int64 ids.

    Raises:
        InputError: the sentencepiece model or symbol file that the options name is not there, or
            the host makes no tokenizer of the options.
    """
    register()
    from espnet2.tasks.lm import LMTask

    args = argparse.Namespace(**vars(args))
    if not getattr(args, "use_preprocessor", True):
        raise InputError(
            f"{where} has use_preprocessor: false, so it does not tell how to make tokens",
            todo="set use_preprocessor, token_type (and bpemodel) in it",
        )
    if getattr(args, "token_type", None) is None:
        raise InputError(f"{where} has no token_type", expected="bpe, char or word")
    for option, path in find_tokenizer_files(args, where).items():
        setattr(args, option, path)
    try:
        preprocess = LMTask.build_preprocess_fn(args, False)
        preprocess("utt", {"text": "a"})  # cleaners are looked up at the first sentence
        return preprocess
    except Exception as error:  # whatever the host raises for odd values
        raise InputError(
            f"the host makes no tokenizer of {where}",
            found=f"{type(error).__name__}: {error}",
            expected="token_type, bpemodel, cleaner and g2p as lm_train wrote them",
        ) from error


def find_tokenizer_files(args: argparse.Namespace, where: str) -> Dict[str, str]:
    """Where the files are that the tokenizer options name: {"bpemodel": ..., ...}.

    Raises:
        InputError: one of them is missing.
    """
    found = {}
    for option in ("bpemodel", "non_linguistic_symbols"):
        name = getattr(args, option, None)
        if option == "bpemodel" and getattr(args, "token_type", None) != "bpe":
            continue
        if isinstance(name, str):
            found[option] = str(_find_file(name, option, where))
        elif option == "bpemodel":
            raise InputError(f"{where} has token_type: bpe but no bpemodel")
    return found


def _find_file(name: str, option: str, where: str) -> Path:
    """A file named in config.yaml: as written, from a parent of the experiment, or beside it."""
    folder = Path(where).resolve().parent
    # Recipes write paths relative to the recipe folder, a few levels above exp/lm_x.
    places = [Path(name)]
    if not Path(name).is_absolute():
        places += [parent / name for parent in [folder, *folder.parents][:4]]
    places.append(folder / Path(name).name)
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(dict.fromkeys(str(p.absolute()) for p in places))
    raise InputError(
        f"the {option} file of {where} is missing",
        found=f"nothing at {looked}",
        todo=f"run this in the recipe folder, or put {Path(name).name} beside config.yaml",
    )


def tokenize(exp, sentences: Sequence[Tuple[str, str]]) -> TokenizedText:
    """Turn sentences into ids with the tokenizer of ``exp`` (an Experiment); unknown words are
    counted and reported, and go in as <unk>, as the host does.

    Raises:
        InputError: as `build_tokenizer`, or no token can be made at all.
    """
    preprocess = build_tokenizer(exp.args, str(exp.config))
    unk = exp.special_ids["unk"]

    def ids_of(utt: str, text: str) -> torch.Tensor:
        return torch.from_numpy(preprocess(utt, {"text": text})["text"]).long()

    oov_by_word: dict = {}
    ids, n_words = [], []
    n_oov_tokens = n_oov_words = 0
    for utt, text in sentences:
        tokens = ids_of(utt, text)
        words = text.split()
        n_unk = int((tokens == unk).sum()) if unk is not None else 0
        if n_unk:
            n_oov_tokens += n_unk
            for word in words:
                if word not in oov_by_word:
                    oov_by_word[word] = bool((ids_of(utt, word) == unk).any())
                n_oov_words += oov_by_word[word]
        ids.append(tokens)
        n_words.append(len(words))
    if n_oov_tokens:
        examples = [word for word, is_oov in oov_by_word.items() if is_oov][:5]
        n_tokens = sum(len(x) for x in ids)
        LOG.warning(
            "%d of %d tokens (in %d of %d words) are unknown to the LM, scored as <unk>: %s ...",
            *(n_oov_tokens, n_tokens, n_oov_words, sum(n_words)),
            " ".join(examples),
        )
        if n_oov_tokens == n_tokens:
            raise InputError(
                "no token of the text is known to the LM",
                found=" ".join(examples),
                expected=f"tokens such as {' '.join(exp.token_list[2:8])}",
                todo="check the language and letter case (upper, lower) of the text",
            )
    return TokenizedText([utt for utt, _ in sentences], ids, n_words, n_oov_tokens, n_oov_words)


def batches(
    exp, text: TokenizedText, *, batch_size: int = 32, max_batch_tokens: int = 8192
) -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (inputs, targets, mask) in the order of ``text``.

    inputs (B, T) int64 start with sos, targets (B, T) int64 end with eos, mask (B, T) bool
    marks predicted tokens; padding is the host's ignore id 0. B is at most ``batch_size`` and
    small enough that B * T <= ``max_batch_tokens`` (one sentence may be longer).
    """
    sos, eos = exp.special_ids["sos"], exp.special_ids["eos"]
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
