"""The host's own tokenizer for an LM experiment: text -> token ids exactly as it trains on them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.file_kind import refuse_unfetched
from espnet_mpq.hosts.espnet.registry import register
from espnet_mpq.io import read_lines
from espnet_mpq.text import TokenizedText, shown

LOG = logging.getLogger("espnet_mpq")


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
    _check_symbols(getattr(args, "non_linguistic_symbols", None), where)
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
            refuse_unfetched(place)
            return place
    for place in places:
        refuse_unfetched(place)
    looked = ", ".join(dict.fromkeys(str(p.absolute()) for p in places))
    raise InputError(
        f"the {option} file of {where} is missing",
        found=f"nothing at {looked}",
        todo=f"run this in the recipe folder, or put {Path(name).name} beside config.yaml",
    )


def _check_symbols(symbols, where: str) -> None:
    """An empty non-linguistic symbol is found everywhere: the host's tokenizer would not end."""
    lines = read_lines(symbols) if isinstance(symbols, str) else symbols or []
    for number, line in enumerate(lines, 1):
        if not line.rstrip():
            raise InputError(
                f"{symbols if isinstance(symbols, str) else where}, non-linguistic symbols",
                found=f"an empty one in line {number}",
                todo="remove it",
            )


def tokenize(exp, sentences: Sequence[Tuple[str, str]]) -> TokenizedText:
    """Turn sentences into ids with the tokenizer of ``exp`` (an Experiment); unknown words are
    counted and reported, and go in as <unk>, as the host does.

    Raises:
        InputError: as `build_tokenizer`, or no token can be made at all.
    """
    preprocess = build_tokenizer(exp.args, str(exp.config))
    unk = exp.vocabulary.special_ids["unk"]

    def ids_of(utt: str, text: str) -> torch.Tensor:
        return torch.from_numpy(preprocess(utt, {"text": text})["text"]).long()

    oov_by_word: Dict[str, bool] = {}  # and white space but the blank
    ids, n_words = [], []
    n_oov_tokens = n_oov_words = 0
    for utt, text in sentences:
        tokens = ids_of(utt, text)
        words = text.split()
        n_unk = int((tokens == unk).sum()) if unk is not None else 0
        if n_unk:
            n_oov_tokens += n_unk
            for word in [*words, *_odd_spaces(text)]:
                if word not in oov_by_word:
                    oov_by_word[word] = bool((ids_of(utt, word) == unk).any())
            n_oov_words += sum(oov_by_word[word] for word in words)
        ids.append(tokens)
        n_words.append(len(words))
    if n_oov_tokens:
        examples = [shown(word) for word, is_oov in oov_by_word.items() if is_oov][:5]
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
                expected=f"tokens such as {' '.join(exp.vocabulary.tokens[2:8])}",
                todo="check the language and letter case (upper, lower) of the text",
            )
    return TokenizedText([utt for utt, _ in sentences], ids, n_words, n_oov_tokens, n_oov_words)


def _odd_spaces(text: str) -> List[str]:
    """White space within a sentence that is no blank; a character LM has no token for it."""
    return sorted({c for c in text if c.isspace() and c != " "})
