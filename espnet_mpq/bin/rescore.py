"""`mpq rescore`: n-best lists of a first pass in the order that language models give them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Dict, List

from espnet_mpq.bin import scoring
from espnet_mpq.bin.options import provenance
from espnet_mpq.errors import InputError, near_matches
from espnet_mpq.io import atomic_write, write_json

LOG = logging.getLogger("espnet_mpq")
EXAMPLE = """\
Decode once without LM and with `nbest: 10` or more in the decoding configuration, then
  mpq tune --nbest exp/asr/decode_nbest/dev --ref dump/raw/dev/text \\
      --lm_exp lm=exp/lm_packed --output exp/asr/weights.json
  mpq rescore --nbest exp/asr/decode_nbest/test --lm_exp lm=exp/lm_packed \\
      --weights exp/asr/weights.json --output_dir exp/asr/rescored/test
  mpq compare --ref dump/raw/test/text --hyp_a exp/asr/decode_nbest/test/text \\
      --hyp_b exp/asr/rescored/test/1best_recog/text

The total of a hypothesis is the sum of weight x part. Parts are the scores of the first pass,
every LM (natural logarithm, sentence end included) and "length" (tokens of the first pass, or
words where the lists have no tokens). Each prefix that hypotheses share is computed once.

example of a density ratio (external minus source LM plus length reward):
  mpq rescore --nbest test.jsonl --lm_exp ext=exp/lm_new --source_lm_exp src=exp/lm_training \\
      --weight ext=0.7 src=-0.5 length=0.2 --output_dir rescored

writes OUTPUT_DIR/1best_recog/{text,token,score} (the host's files), nbest.jsonl (every
hypothesis in the new order with all its parts), rescore.json (weights, speed, provenance) and
parts/NAME.jsonl (scores of one LM; a killed run goes on from them, and other weights cost
nothing).
"""
FORMAT_NAME, VERSION = "espnet_mpq.rescoring", 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    scoring.add_arguments(parser)
    parser.epilog = EXAMPLE
    parser.add_argument("--weights", metavar="FILE", help="weights.json of `mpq tune`")
    parser.add_argument(
        "--weight",
        nargs="+",
        default=[],
        metavar="PART=X",
        help="weights by hand; they win over --weights; scores of the first pass have 1",
    )
    parser.add_argument(
        "--wer",
        action="store_true",
        help="print word error rates: first pass, rescored, and the best that the lists hold",
    )
    scoring.add_error_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="folder for the results")


def main(args: argparse.Namespace) -> None:
    """Rescore, write the results and print a summary."""
    from espnet_mpq.decode.nbest import listed, read_nbest, write_best
    from espnet_mpq.decode.rescore import rescore

    weights = read_weights(args)
    lists = read_nbest(args.nbest)
    output = Path(args.output_dir)
    scored = scoring.score_all(args, lists, output / "parts").with_share(weights.share)
    complete(weights, scored, bool(args.weights))
    tuned_here = weights.overlap([one.utt for one in lists])
    if tuned_here:
        LOG.warning(
            "the weights were tuned on %d of these %d utterances (%s): this is no test result",
            *(len(tuned_here), len(lists), listed(tuned_here)),
        )
    results = rescore(lists, scored.parts, weights.weights)
    rates = error_rates(args, lists, results) if args.wer or args.ref else None
    write_best(output / "1best_recog", results)
    import json

    lines = (json.dumps(result.to_dict(), ensure_ascii=False) + "\n" for result in results)
    atomic_write(output / "nbest.jsonl", "".join(lines))
    empty = [one.utt for one in lists if not len(one)]
    if empty:
        LOG.warning(
            "%d utterances have no hypothesis, written as empty: %s", len(empty), listed(empty)
        )
    n_changed = sum(len(r.nbest) > 0 and int(r.order[0]) != 0 for r in results)
    summary = {
        "format": FORMAT_NAME,
        "version": VERSION,
        "n_utterances": len(lists),
        "n_hypotheses": sum(map(len, lists)),
        "n_without_hypothesis": len(empty),
        "n_changed": n_changed,
        "n_tuned_on": len(tuned_here),
        "weights": weights.weights,
        "score": weights.score,
        "tokens": weights.tokens,
        "share": weights.share,
        "lms": {name: part.identity for name, part in scored.kinds.items() if part.identity},
        "ms_per_hypothesis": scored.speed,
        "wer_percent": rates,
        "provenance": provenance(args, {"weights": args.weights}),
    }
    write_json(output / "rescore.json", summary)
    print(f"{summary['n_utterances']} utterances, {summary['n_hypotheses']} hypotheses")
    print("weights: " + ", ".join(f"{k} {v:.4g}" for k, v in weights.weights.items()))
    for name, ms in scored.speed.items():
        print(f"{name}: {ms:.3f} ms a hypothesis")
    if rates:
        print("WER %: " + ", ".join(f"{name} {value:.2f}" for name, value in rates.items()))
    print(f"another best hypothesis in {n_changed} utterances")
    print(f"written to {output}: 1best_recog/text, nbest.jsonl, rescore.json")


def error_rates(args: argparse.Namespace, lists: List, results: List) -> Dict[str, float]:
    """Word error rates in percent: of the first hypotheses, of the new best ones, of the oracle."""
    errors, n_words, n_fixed = scoring.count_errors(args, lists)
    filled = [(e, r.order[0]) for e, r in zip(errors, results) if len(e)]
    counts = {
        "first pass": sum(int(e[0]) for e, _ in filled),
        "rescored": sum(int(e[best]) for e, best in filled),
        "oracle": sum(int(e.min()) for e, _ in filled),
    }
    return {name: 100.0 * (count + n_fixed) / n_words for name, count in counts.items()}


def read_weights(args: argparse.Namespace):
    """The weights of the options; sets args.score, .tokens and .interpolate to what they need.

    Raises:
        InputError: no weight at all, a word that is not PART=X, or options other than those
            that the weights were tuned with.
    """
    from espnet_mpq.decode.weights import Weights, load_weights

    by_hand = parse_weights(args.weight)
    if not args.weights:
        if not by_hand:
            raise InputError(
                "no weights", todo="give --weights of `mpq tune`, or for example --weight lm=0.5"
            )
        return Weights(by_hand, args.score or "sum", args.tokens or "text", args.interpolate)
    weights = load_weights(args.weights)
    for option, name in (("score", "score"), ("tokens", "tokens"), ("interpolate", "share")):
        given, tuned = getattr(args, option), getattr(weights, name)
        if given is not None and given != tuned:
            raise InputError(
                f"--{option} differs from what {args.weights} was tuned with",
                found=given,
                expected=tuned,
                todo=f"leave --{option} out, or tune with it",
            )
        setattr(args, option, tuned)
    weights.weights.update(by_hand)
    return weights


def parse_weights(words: List[str]) -> Dict[str, float]:
    """PART=X, ... as a dict; raises InputError."""
    found = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise InputError("--weight", found=word, expected="PART=NUMBER, for example lm=0.5")
    return found


def complete(weights, scored, from_file: bool) -> None:
    """Check weights against the parts that there are; the first pass counts 1 if none is given.

    Raises:
        InputError: a weight without part, an LM without weight, a source LM that is added.
    """
    from espnet_mpq.decode.parts import FIRST_PASS, LM, SOURCE

    kinds = scored.kinds
    for name in weights.weights:
        if name not in kinds:
            raise InputError(
                f"there is a weight for {name!r}, but no such part",
                expected=", ".join(kinds),
                todo=f"{near_matches(name, kinds)}; name LMs as in the weights: --lm_exp NAME=EXP",
            )
    first = [name for name, part in kinds.items() if part.kind == FIRST_PASS]
    if not any(name in weights.weights for name in first):
        weights.weights = {**dict.fromkeys(first, 1.0), **weights.weights}
    for name, part in kinds.items():
        weight = weights.weights.get(name)
        if part.kind in (LM, SOURCE) and weight is None:
            raise InputError(
                f"{name} has no weight",
                found=", ".join(weights.weights),
                todo="tune with this LM, or give --weight",
            )
        if part.kind == SOURCE and weight > 0:
            raise InputError(
                f"the weight of the source LM {name}", found=weight, expected="below 0"
            )
        tuned_for = weights.lms.get(name)
        if from_file and tuned_for is not None and tuned_for != part.identity:
            LOG.warning("%s is not the LM that the weights were tuned for", name)
