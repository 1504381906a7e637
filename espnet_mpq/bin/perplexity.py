"""mpq perplexity: perplexity of an fp, quantized or packed LM on a text."""

from __future__ import annotations

import argparse

from espnet_mpq import __version__
from espnet_mpq.io import sha256_file, token_list_sha256, write_json

HELP = "perplexity of an fp, quantized or packed LM per token and per word"
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
    from espnet_mpq.hosts.espnet import experiment, perplexity
    from espnet_mpq.hosts.espnet import text as host_text

    sentences = host_text.read_text(text, text_format)
    exp = experiment.load_lm(lm_exp, lm_file)
    tokenized = host_text.tokenize(exp, sentences)
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
            "token_list_sha256": token_list_sha256(exp.token_list),
        },
    }


def to_text(result: dict) -> str:
    """The numbers as a few lines for people."""
    lines = [
        f"{result['provenance']['lm_exp']}/{result['provenance']['lm_file']}",
        f"perplexity per token  {result['ppl']:.4f} +- {result['ppl_stderr']:.4f}"
        f"  ({result['n_tokens']} tokens, {result['n_sentences']} of them sentence ends)",
        f"perplexity per word   {result['word_ppl']:.4f} +- {result['word_ppl_stderr']:.4f}"
        f"  ({result['n_words']} words and {result['n_sentences']} sentence ends)",
    ]
    if result["n_oov_tokens"]:
        lines.append(
            f"unknown to the LM     {result['n_oov_words']} words"
            f" ({result['n_oov_tokens']} tokens), scored as <unk>"
        )
    return "\n".join(lines)
