"""`mpq tune`: weights for `mpq rescore` that make the fewest word errors on a development set."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Dict, List, Sequence

from espnet_mpq.bin import scoring
from espnet_mpq.bin.options import provenance
from espnet_mpq.errors import InputError
from espnet_mpq.io import atomic_write

LOG = logging.getLogger("espnet_mpq")
EXAMPLE = """\
example:
  mpq tune --nbest exp/asr/decode_nbest/dev --ref dump/raw/dev/text --lm_exp lm=exp/lm_packed \\
      --test exp/asr/decode_nbest/test --output exp/asr/weights.json
  mpq rescore --nbest exp/asr/decode_nbest/test --lm_exp lm=exp/lm_packed \\
      --weights exp/asr/weights.json --output_dir exp/asr/rescored/test

The corpus error count is piecewise constant along any line through the weights; every search
along a line finds its exact minimum (Och 2003). Weights of LMs stay at 0 or above, of source LMs
(--source_lm_exp, density ratio) at 0 or below; the first score of the first pass has weight 1.
Tune every system of a comparison on its own, on a development set, never on the test set: a
development set that shares utterances with --test is refused.
Scores are kept in OUTPUT.parts/, so a killed run goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    scoring.add_arguments(parser)
    parser.epilog = EXAMPLE
    parser.add_argument("--output", required=True, help="weights.json to write")
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="NBEST_OR_TEXT",
        help="the test sets, to make sure that none of their utterances is tuned on",
    )
    parser.add_argument(
        "--decode_config",
        metavar="FILE.yaml",
        help="also write lm_weight and penalty for the host's shallow fusion (one --lm_exp)",
    )
    scoring.add_error_arguments(parser)
    add = parser.add_argument_group("search").add_argument
    add(
        "--shares",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="shares of the LM to try when it "
        "is mixed with the --ngram word by word (default with --interpolate: that one alone)",
    )
    add("--no_length", action="store_true", help="no length reward")
    add("--restarts", type=int, default=8, help="starting points (default 8)")
    add("--seed", type=int, default=0, help="of the random starting points and directions")


def main(args: argparse.Namespace) -> None:
    """Tune, write the weights and print them."""
    from espnet_mpq.decode.nbest import read_nbest
    from espnet_mpq.decode.tune import tune_parts
    from espnet_mpq.decode.weights import Weights

    if args.shares and args.interpolate is None:
        args.interpolate = args.shares[0]
    if args.decode_config and (len(args.lm_exp) != 1 or args.interpolate is not None):
        raise InputError("--decode_config is for one --lm_exp without --interpolate")
    lists = read_nbest(args.nbest)
    refuse_test(lists, args.nbest, args.test)
    errors, n_words, n_fixed = scoring.count_errors(args, lists)
    scored = scoring.score_all(args, lists, Path(f"{args.output}.parts"))
    shares = args.shares or [args.interpolate]
    options = dict(use_length=not args.no_length, n_restarts=args.restarts, seed=args.seed)
    found = [
        (*tune_parts(scored.with_share(share), errors, n_fixed, **options), share)
        for share in shares
    ]
    values, tuned, share = min(found, key=lambda one: one[1].n_errors)
    kinds = scored.with_share(share).kinds
    first = n_fixed + sum(int(e[0]) for e in errors if len(e))
    oracle = n_fixed + sum(int(e.min()) for e in errors if len(e))
    result = {
        "n_utterances": len(lists),
        "n_words": n_words,
        "n_errors": tuned.n_errors,
        "wer_percent": 100.0 * tuned.n_errors / n_words,
        "first_pass_wer_percent": 100.0 * first / n_words,
        "oracle_wer_percent": 100.0 * oracle / n_words,
        "restarts": tuned.starts,
        "n_lines": tuned.n_lines,
    }
    if len(shares) > 1:
        result["errors_by_share"] = {str(share): t.n_errors for _, t, share in found}
    weights = Weights(
        values,
        args.score or "sum",
        args.tokens or "text",
        share,
        {name: kinds[name].identity for name in values if kinds[name].identity},
        result,
        [one.utt for one in lists],
        provenance(args, {"ref": args.ref}),
    )
    weights.save(args.output)
    if args.decode_config:
        write_decode_config(args, weights, kinds)
    print(f"{result['n_utterances']} utterances, {n_words} reference words")
    print(
        f"first pass {result['first_pass_wer_percent']:.2f} % WER, tuned "
        f"{result['wer_percent']:.2f} %, oracle {result['oracle_wer_percent']:.2f} %"
    )
    print(
        "weights: "
        + ", ".join(f"{k} {v:.4g}" for k, v in weights.weights.items())
        + ("" if share is None else f"; share {share:g}")
    )
    print(f"written to {args.output}")


def refuse_test(lists: Sequence, path: str, tests: Sequence[str]) -> None:
    """Raises InputError when a test set shares utterances with the development set."""
    from espnet_mpq.decode.nbest import listed

    ours = {one.utt for one in lists}
    for test in tests:
        shared = sorted(ours & utterances_of(Path(test)))
        if shared:
            raise InputError(
                f"{path} shares utterances with the test set {test}",
                found=f"{len(shared)}: {listed(shared)}",
                todo="tune on a development set: weights tuned on the test set make its WER "
                "worthless",
            )


def utterances_of(path: Path) -> set:
    """The utterances of n-best lists or of a file of transcripts."""
    from espnet_mpq.decode.nbest import read_nbest
    from espnet_mpq.evaluate.hypotheses import read_transcripts

    is_nbest = path.is_dir() or ".jsonl" in path.suffixes or path.suffix == ".json"
    return {one.utt for one in read_nbest(path)} if is_nbest else set(read_transcripts(path))


def write_decode_config(args: argparse.Namespace, weights, kinds: Dict) -> None:
    """The weights as the host's shallow fusion takes them."""
    from espnet_mpq.decode.parts import LENGTH, LM

    (lm,) = [name for name in weights.weights if kinds[name].kind == LM]
    lines: List[str] = [
        f"# Tuned by mpq tune on {args.nbest}; the LM is {args.lm_exp[0]}.",
        f"lm_weight: {weights.weights[lm]:.6g}",
        f"penalty: {weights.weights.get(LENGTH, 0.0):.6g}",
    ]
    atomic_write(args.decode_config, "\n".join(lines) + "\n")
