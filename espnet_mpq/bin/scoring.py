"""What `mpq rescore` and `mpq tune` share: the LMs of the command line and their part scores."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Sequence, Tuple

from espnet_mpq.errors import InputError
from espnet_mpq.progress import progress

if TYPE_CHECKING:
    from espnet_mpq.decode.parts import Scored
LOG = logging.getLogger("espnet_mpq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both commands."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--nbest",
        required=True,
        help="the host's decode folder (decoded with nbest: N), a JSON lines file of "
        '{"id", "hyps": [{"text", "score", "token"}]} (.gz too), or Kaldi\'s words_text folder',
    )
    add = parser.add_argument_group("language models").add_argument
    add(
        "--lm_exp",
        nargs="+",
        default=[],
        metavar="[NAME=]EXP",
        help="LM experiments, float or packed, or a checkpoint in one; NAME (default: the "
        "folder's) is what the LM is called in the weights",
    )
    add(
        "--backward_lm_exp",
        nargs="+",
        default=[],
        metavar="[NAME=]EXP",
        help="LMs trained on text whose words were put in reverse order",
    )
    add(
        "--source_lm_exp",
        nargs="+",
        default=[],
        metavar="[NAME=]EXP",
        help="density ratio: LMs of"
        " the recogniser's training text, which are subtracted (weights below 0)",
    )
    add(
        "--ngram",
        nargs="+",
        default=[],
        metavar="[NAME=]ARPA",
        help="n-gram LMs over words (.gz too; read by kenlm where it is installed)",
    )
    add = parser.add_argument_group("scores").add_argument
    add(
        "--interpolate",
        type=float,
        metavar="SHARE",
        help="mix the --lm_exp and the --ngram word "
        "by word: SHARE * p_lm + (1 - SHARE) * p_ngram, one part called LM+NGRAM",
    )
    add(
        "--score",
        choices=("sum", "mean", "rank"),
        help="what the lists' scores are: sums over a "
        "hypothesis (default), means per token, or not there: use the ranks",
    )
    add(
        "--tokens",
        choices=("text", "nbest"),
        help="what LMs score: the words, through their own "
        "tokenizers (default), or the tokens of the first pass, as shallow fusion does",
    )


def add_error_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of how errors are counted."""
    add = parser.add_argument_group("errors, as mpq compare counts them").add_argument
    add("--unit", choices=("word", "char"), default="word", help="char: character errors")
    add("--case_sensitive", action="store_true", help="A is not a, as sclite -s")
    add("--non_linguistic_symbols", metavar="FILE", help="symbols, one a line, left out")
    add(
        "--ref",
        help="references `utt text` or trn lines"
        " (default: those in the n-best file)",
    )


def named(words: Sequence[str]) -> List[Tuple[str, Path]]:
    """(name, path) of every [NAME=]PATH."""
    found = []
    for word in words:
        name, equals, path = word.partition("=")
        path = Path(path if equals else word)
        if not equals:
            folder = path.parent if path.is_file() and path.parent.name else path
            name = (
                path.name.split(".")[0] if path.suffix in (".arpa", ".gz", ".bin") else folder.name
            )
        found.append((name or path.resolve().name, path))
    return found


def open_scorers(args: argparse.Namespace) -> List[Tuple[object, str]]:
    """(scorer, kind) of every LM that the options name.

    Raises:
        InputError: two LMs of one name, nothing to score with, or an interpolation that cannot
            be; and as open_scorer and Ngram.
    """
    from espnet_mpq.decode.parts import LM, SOURCE

    groups = [
        (named(args.lm_exp), LM, False),
        (named(args.backward_lm_exp), LM, True),
        (named(args.source_lm_exp), SOURCE, False),
    ]
    ngrams = named(args.ngram)
    names = [name for found, _, _ in groups for name, _ in found] + [name for name, _ in ngrams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            "two language models have one name",
            found=", ".join(twice),
            todo="name them: --lm_exp a=exp/lm_1 b=exp/lm_2",
        )
    if not names:
        raise InputError("no language model", todo="give --lm_exp, --ngram or others")
    if args.interpolate is not None and (len(args.lm_exp), len(ngrams)) != (1, 1):
        raise InputError(
            "--interpolate mixes one LM with one n-gram LM",
            found=f"{len(args.lm_exp)} of --lm_exp and {len(ngrams)} of --ngram",
        )
    scorers = []
    if any(found for found, _, _ in groups):
        from espnet_mpq.hosts.espnet.lm.scorer import open_scorer

        for found, kind, backward in groups:
            for name, path in found:
                is_file = path.is_file()
                scorer = open_scorer(
                    name,
                    path.parent if is_file else path,
                    path.name if is_file else None,
                    backward=backward,
                    per_word=args.interpolate is not None and kind == LM and not backward,
                    tokens_from=args.tokens or "text",
                )
                scorers.append((scorer, kind))
    if ngrams:
        from espnet_mpq.decode.arpa import Ngram
        from espnet_mpq.decode.part_scores import NgramScorer

        for name, path in ngrams:
            scorers.append((NgramScorer(name, Ngram(path), args.interpolate is not None), LM))
    return scorers


def score_all(args: argparse.Namespace, lists: Sequence, folder: Path) -> "Scored":
    """All part scores of lists; those of LMs are kept in ``folder``/NAME.jsonl.

    Raises:
        InputError, MismatchError, FormatError, HostError: as the scorers, the journals and
            first_pass_parts.
    """
    import numpy

    from espnet_mpq.decode.part_scores import groups_of, score_lists
    from espnet_mpq.decode.parts import first_pass_parts

    scored = first_pass_parts(lists, args.score or "sum")
    scorers = open_scorers(args)
    for scorer, _ in scorers:
        if scorer.name in scored.parts:
            raise InputError(
                f"an LM and a score of the n-best lists are both called {scorer.name!r}",
                todo="name the LM: --lm_exp NAME=EXP",
            )
    n_groups, n_hyps = len(groups_of(lists)), sum(map(len, lists))
    for scorer, kind in scorers:
        if hasattr(scorer, "check"):
            scorer.check(_some_hyps(lists))
        start_s, found, words = time.perf_counter(), [], []
        groups = score_lists(scorer, lists, folder / f"{scorer.name}.jsonl")
        for _, _, values in progress(groups, n_groups, scorer.name):
            found += [numpy.array([s.total for s in one]) for one in values]
            if args.interpolate is not None:
                words += values
        if hasattr(scorer, "unknown") and scorer.unknown():
            LOG.warning("%s, scored as <unk>", scorer.unknown())
        scored.add(scorer.name, found, kind, scorer.identity())
        scored.speed[scorer.name] = 1e3 * (time.perf_counter() - start_s) / max(n_hyps, 1)
        if words:
            scored.keep_words(scorer.name, words)
    if args.interpolate is not None:
        scored.mixed = named(args.lm_exp)[0][0], named(args.ngram)[0][0]
    return scored


def _some_hyps(lists: Sequence) -> List[tuple]:
    """A few hypotheses that are not empty, to try an LM on."""
    found = []
    for one in lists:
        if any(one.texts):
            rank = next(i for i, text in enumerate(one.texts) if text)
            found.append((one.texts[rank], one.tokens[rank] if one.tokens else None))
        if len(found) == 50:
            break
    return found


def references(lists: Sequence, ref: Optional[str], scoring) -> Dict[str, List[str]]:
    """utterance -> tokens of the reference, of every list and perhaps others.

    Raises:
        InputError: lists without reference, or references without a word.
    """
    from espnet_mpq.decode.nbest import listed
    from espnet_mpq.evaluate.hypotheses import read_transcripts

    ours = {one.utt for one in lists}
    if ref is None:
        refs = {one.utt: scoring.tokens(one.ref.split()) for one in lists if one.ref is not None}
    else:
        try:
            refs = read_transcripts(ref, "kaldi", scoring)
        except InputError:  # the first words of trn lines may be equal
            refs = {}
        if not ours <= refs.keys():
            refs = read_transcripts(ref, "auto", scoring)
    missing = [one.utt for one in lists if one.utt not in refs]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(lists)} n-best lists have no reference",
            found=f"missing: {listed(missing)}",
            todo="give the references of this set with --ref" if ref is None else f"check {ref}",
        )
    if not any(refs.values()):
        raise InputError("the references have no word")
    return refs


def count_errors(args: argparse.Namespace, lists: Sequence):
    """(errors of every hypothesis, one array a list; words of all references; errors that no
    choice changes: the words of utterances without a list or without a hypothesis)."""
    from espnet_mpq.decode.nbest import listed
    from espnet_mpq.decode.tune import word_errors
    from espnet_mpq.evaluate.scoring import Scoring, read_symbols
    from espnet_mpq.evaluate.wer import align

    symbols = read_symbols(args.non_linguistic_symbols) if args.non_linguistic_symbols else ()
    scoring = Scoring(args.unit, args.case_sensitive, frozenset(symbols))
    refs = references(lists, args.ref, scoring)
    errors = [
        word_errors(one.texts, refs[one.utt], scoring.tokens, align)
        for one in progress(lists, len(lists), "word errors")
    ]
    filled = {one.utt for one in lists if len(one)}
    without = [utt for utt in refs if utt not in filled]
    if without:
        LOG.warning(
            "%d references have no hypothesis, all their words count as deleted: %s",
            *(len(without), listed(without)),
        )
    return errors, sum(map(len, refs.values())), sum(len(refs[utt]) for utt in without)
