"""`mpq compare`: word error rates of two systems and whether their difference is significant."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
from typing import Dict, Optional

from espnet_mpq import __version__
from espnet_mpq.errors import InputError
from espnet_mpq.evaluate import hypotheses, significance, wer
from espnet_mpq.evaluate.scoring import UNITS, Scoring, read_symbols
from espnet_mpq.io import sha256_file, write_json

EXAMPLE = """example:
  mpq compare --ref dump/raw/test/text --hyp_a exp/asr/decode_fp/test/text \\
      --hyp_b exp/asr/decode_mpq/test/text --names fp mixed --json compare.json
"""
FORMAT_NAME, VERSION = "espnet_mpq.comparison", 1
ALPHA = 0.05
FEW_SEGMENTS = 30
LOG = logging.getLogger("espnet_mpq")
_MARK = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")  # <noise>, [laughter]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("--ref", required=True, help="references, one utterance a line")
    parser.add_argument("--hyp_a", required=True, help="hypotheses of the baseline")
    parser.add_argument("--hyp_b", required=True, help="hypotheses of the other system")
    parser.add_argument("--names", nargs=2, default=["a", "b"], metavar=("A", "B"))
    parser.add_argument(
        "--text_format",
        choices=hypotheses.FILE_FORMATS,
        default="auto",
        help="kaldi: `utt words`; trn: `words (utt)`; plain: words, paired by line number; auto: "
        "kaldi or trn, whichever gives all files the same utterances",
    )
    parser.add_argument("--unit", choices=UNITS, default="word", help="char: character error rate")
    parser.add_argument(
        "--case_sensitive",
        action="store_true",
        help="A is not a, as sclite -s (default: as the host's scoring, which calls sclite "
        "without: the case of ASCII letters is ignored)",
    )
    parser.add_argument(
        "--non_linguistic_symbols",
        metavar="FILE",
        help="symbols, one a line, left out of all texts (nlsyms_txt of the recipe)",
    )
    parser.add_argument("--cleaner", help="the host's text cleaner for all texts (of the recipe)")
    parser.add_argument(
        "--margin",
        type=float,
        metavar="PERCENT",
        help="also test whether the error rates differ by less than this, percent absolute "
        "(two one-sided tests)",
    )
    parser.add_argument("--json", help="write all numbers to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--n_replications", type=int, default=10000, help="of the bootstrap")


def main(args: argparse.Namespace) -> None:
    """Print the comparison; write it to ``args.json`` if given."""
    result = compare(
        args.ref,
        args.hyp_a,
        args.hyp_b,
        names=args.names,
        text_format=args.text_format,
        unit=args.unit,
        case_sensitive=args.case_sensitive,
        non_linguistic_symbols=args.non_linguistic_symbols,
        cleaner=args.cleaner,
        margin=args.margin,
        seed=args.seed,
        n_replications=args.n_replications,
    )
    print(to_text(result))
    if args.json:
        write_json(args.json, result)


def compare(
    ref,
    hyp_a,
    hyp_b,
    *,
    names=("a", "b"),
    text_format: str = "auto",
    unit: str = "word",
    case_sensitive: bool = False,
    non_linguistic_symbols=None,
    cleaner: Optional[str] = None,
    margin: Optional[float] = None,
    seed: int = 0,
    n_replications: int = 10000,
) -> dict:
    """All numbers of a comparison of two hypothesis files with one reference.

    Error rates are those of the host's scoring stage (see `evaluate.scoring`), given the
    symbols and the cleaner of the recipe.

    Returns:
        {"systems": {name: counts and wer_percent}, "mapsswe": {...}, "bootstrap": {...},
        ...} as written by `--json`.

    Raises:
        InputError: unreadable files, equal names, or sets of utterances that differ.
        HostError: a cleaner without the host.
    """
    name_a, name_b = names
    if name_a == name_b:
        raise InputError("the two systems have one name", found=repr(name_a), todo="use --names")
    files = {"ref": ref, "hyp_a": hyp_a, "hyp_b": hyp_b}
    symbols = read_symbols(non_linguistic_symbols) if non_linguistic_symbols else frozenset()
    clean = _host_cleaner(cleaner) if cleaner else None
    scoring = Scoring(unit, case_sensitive, symbols, clean)
    read, formats = hypotheses.read_together(files, text_format, scoring)
    _warn(read, scoring)
    utts, refs, hyps = hypotheses.pair(read["ref"], {name_a: read["hyp_a"], name_b: read["hyp_b"]})
    steps = {name: wer.align_all(refs, hyps[name]) for name in names}
    counts = {name: wer.count(steps[name]) for name in names}
    test = significance.mapsswe_of_alignments(steps[name_a], steps[name_b])
    interval = significance.bootstrap_difference(steps[name_a], steps[name_b], n_replications, seed)
    within = {}
    if margin is not None:
        tost = significance.equivalence(test, counts[name_a].n_ref, margin)
        within = {**dataclasses.asdict(tost), "p_value": tost.p_value}
        within["equivalent"] = tost.p_value < ALPHA
    return {
        "format": FORMAT_NAME,
        "version": VERSION,
        "unit": unit,
        "text_formats": formats,
        "scoring": {
            "case_sensitive": case_sensitive,
            "non_linguistic_symbols": sorted(symbols),
            "cleaner": cleaner,
        },
        "n_utterances": len(utts),
        "systems": {
            name: {**dataclasses.asdict(c), "n_errors": c.n_errors, "wer_percent": c.wer_percent}
            for name, c in counts.items()
        },
        "mapsswe": dataclasses.asdict(test),
        "equal_hypotheses": hyps[name_a] == hyps[name_b],
        "significant": test.p_value < ALPHA,
        "alpha": ALPHA,
        **({"equivalence": within} if within else {}),
        "bootstrap": dataclasses.asdict(interval),
        "provenance": {
            "tool_version": __version__,
            "seed": seed,
            "inputs": {
                role: {"path": str(path), "sha256": sha256_file(path)}
                for role, path in files.items()
            },
        },
    }


def _host_cleaner(name: str):
    from espnet_mpq.hosts.espnet.lm.cleaner import make_cleaner

    return make_cleaner(name)


def _warn(read: Dict[str, hypotheses.Transcripts], scoring: Scoring) -> None:
    """Tokens that the host's scoring may take for something else."""
    tokens = {t for transcripts in read.values() for words in transcripts.values() for t in words}
    braces = sorted(t for t in tokens if "{" in t)
    if braces:
        LOG.warning(
            "sclite reads { as the start of alternatives, here it is scored as it stands (%s): "
            "the host's number may differ",
            " ".join(braces[:3]),
        )
    marks = sorted(t for t in tokens if _MARK.fullmatch(t))
    if scoring.unit == "word" and not scoring.symbols and marks:
        LOG.warning(
            "%s: scored as words; a recipe with nlsyms_txt leaves them out: "
            "--non_linguistic_symbols FILE",
            " ".join(marks[:3]),
        )


def to_text(result: dict) -> str:
    """The comparison as a few lines for people."""
    word = "word" if result["unit"] == "word" else "character"
    rate = "WER" if result["unit"] == "word" else "CER"
    width = max(6, *(len(name) for name in result["systems"]))
    lines = [f"{'system':<{width}} {rate + ' %':>8} {'sub':>7} {'del':>7} {'ins':>7} {'errors':>7}"]
    for name, c in result["systems"].items():
        lines.append(
            f"{name:<{width}} {c['wer_percent']:8.2f} {c['n_sub']:7d} {c['n_del']:7d}"
            f" {c['n_ins']:7d} {c['n_errors']:7d}"
        )
    n_ref = next(iter(result["systems"].values()))["n_ref"]
    n_utts = _some(result["n_utterances"], "utterance")
    lines.append(f"{n_utts}, {_some(n_ref, 'reference ' + word)}")
    formats = result["text_formats"]
    if len(set(formats.values())) == 1:
        lines.append(f"files read as {formats['ref']} lines")
    else:
        lines.append("files read as " + ", ".join(f"{k} {v}" for k, v in formats.items()))
    if result["scoring"]["case_sensitive"]:
        lines.append("letter case counts, as for sclite -s")
    else:
        lines.append(
            "the case of ASCII letters is ignored, as by sclite in the host's scoring"
            " (--case_sensitive)"
        )
    test, interval = result["mapsswe"], result["bootstrap"]
    name_a, name_b = result["systems"]
    if result["equal_hypotheses"]:
        lines.append("the hypotheses are equal")
        return "\n".join(lines)
    verdict = "significant" if result["significant"] else "not significant"
    lines.append(
        f"MAPSSWE: p {format_p(test['p_value'])} (two-sided), {verdict} at {result['alpha']}"
        f" ({_some(test['n_segments'], 'segment')}, Z = {test['z']:.3f})"
    )
    within = result.get("equivalence")
    if within:
        lines.append(
            f"{'equivalent' if within['equivalent'] else 'not shown to be equivalent'} within "
            f"{within['margin_percent']:g} absolute: p {format_p(within['p_value'])}; {name_b} is "
            f"not worse by that: p {format_p(within['p_not_worse'])}"
        )
    if 0 < test["n_segments"] < FEW_SEGMENTS:
        lines.append("  few segments: the normal approximation of the test is rough")
    lines.append(
        f"{rate} {name_b} - {name_a}: {interval['difference_percent']:+.2f}"
        f" [{interval['low_percent']:+.2f}, {interval['high_percent']:+.2f}]"
        f" ({100 * interval['confidence']:.0f}% bootstrap, "
        f"{_some(interval['n_replications'], 'draw')}); {name_b} better in"
        f" {100 * interval['probability_b_better']:.1f}%, equal in"
        f" {100 * interval['probability_equal']:.1f}%, worse in"
        f" {100 * interval['probability_b_worse']:.1f}% of draws"
    )
    return "\n".join(lines)


def format_p(p_value: float) -> str:
    """ "= " and three decimals, or "< 0.001"."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def _some(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
