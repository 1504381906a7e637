"""mpq perplexity: perplexity of an fp, quantized or packed LM on a text."""

from __future__ import annotations

import argparse
import math

from espnet_mpq import __version__
from espnet_mpq.errors import InputError
from espnet_mpq.io import sha256_file, write_json

EXAMPLE = """example:
  mpq perplexity exp/lm_train_lm_mpq --text dump/raw/lm_test.txt
  mpq perplexity exp/lm_packed --text test.txt --json perplexity.json
"""
FORMAT_NAME, VERSION = "espnet_mpq.perplexity", 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument("lm_exp", help="experiment folder: config.yaml and weights (or packed)")
    parser.add_argument("--text", required=True, help="plain text or `utt text` lines (.gz too)")
    parser.add_argument("--text_format", choices=("auto", "plain", "kaldi"), default="auto")
    parser.add_argument("--lm_file", help="checkpoint in lm_exp (default: packed, else best)")
    parser.add_argument("--batch_size", type=int, default=32, help="sentences at a time")
    parser.add_argument("--json", help="write all numbers to this file")


def main(args: argparse.Namespace) -> None:
    """Print the perplexity; write it to ``args.json`` if given."""
    result = measure(
        args.lm_exp,
        args.text,
        lm_file=args.lm_file,
        text_format=args.text_format,
        batch_size=args.batch_size,
    )
    print(to_text(result))
    if args.json:
        write_json(args.json, result)


def measure(
    lm_exp, text, *, lm_file=None, text_format: str = "auto", batch_size: int = 32
) -> dict:
    """All numbers of `Perplexity` as a dict, with the files they come from.

    Raises:
        InputError, MismatchError, FormatError, HostError: as `load_lm`, `read_text`, `tokenize`.
    """
    if batch_size < 1:  # before the host is started
        raise InputError("--batch_size", found=batch_size, expected="at least 1")
    from espnet_mpq.hosts.espnet.experiment import opened
    from espnet_mpq.hosts.espnet.lm import perplexity
    from espnet_mpq.hosts.espnet.lm.tokenizer import tokenize
    from espnet_mpq.text import read_text_and_format

    sentences, text_format = read_text_and_format(text, text_format)
    exp = opened.load_lm(lm_exp, lm_file)
    tokenized = tokenize(exp, sentences)
    numbers = perplexity.measure(exp, tokenized, batch_size=batch_size)
    return {
        "format": FORMAT_NAME,
        "version": VERSION,
        **numbers.to_dict(),
        "provenance": {
            "tool_version": __version__,
            "lm_exp": str(lm_exp),
            "lm_file": exp.checkpoint.name,
            "lm_file_sha256": sha256_file(exp.checkpoint),
            "text": str(text),
            "text_sha256": sha256_file(text),
            "text_format": text_format,
            "token_list_sha256": exp.vocabulary.sha256,
        },
    }


def to_text(result: dict) -> str:
    """The numbers as a few lines for people."""
    n_ends, record = result["n_sentences"], result["provenance"]
    per_token = _with_error(result["ppl"], result["ppl_stderr"], n_ends)
    per_word = _with_error(result["word_ppl"], result["word_ppl_stderr"], n_ends)
    lines = [
        f"{record['lm_exp']}/{record['lm_file']}",
        f"text                  {record['text']}, read as {record['text_format']} lines",
        f"perplexity per token  {per_token}"
        f"  ({_some(result['n_tokens'], 'token')}, {n_ends} of them"
        f" {'a sentence end' if n_ends == 1 else 'sentence ends'})",
        f"perplexity per word   {per_word}"
        f"  ({_some(result['n_words'], 'word')} and {_some(n_ends, 'sentence end')})",
    ]
    if result["n_oov_tokens"]:
        lines.append(
            f"unknown to the LM     {_some(result['n_oov_words'], 'word')}"
            f" ({_some(result['n_oov_tokens'], 'token')}), scored as <unk>"
        )
    return "\n".join(lines)


def _with_error(value: float, stderr: float, n_sentences: int) -> str:
    if n_sentences == 1:
        return f"{_number(value)} (one sentence: no standard error)"
    # Too large for a float, or read from JSON as null.
    if stderr is None or not math.isfinite(stderr):
        return _number(value)
    return f"{_number(value)} +- {_number(stderr)}"


def _number(value: float) -> str:
    return f"{value:.4g}" if value > 1e5 else f"{value:.4f}"


def _some(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
