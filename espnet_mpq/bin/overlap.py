"""`mpq overlap`: does the text of a language model hold sentences of the test sets?"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Dict, Iterator, List, Optional, Sequence

from espnet_mpq.bin.options import provenance
from espnet_mpq.bin.scoring import named
from espnet_mpq.errors import InputError
from espnet_mpq.evaluate import hypotheses
from espnet_mpq.evaluate.overlap import MIN_WORDS, Line, N, overlaps
from espnet_mpq.evaluate.scoring import UNITS, Scoring, read_symbols
from espnet_mpq.io import stream_lines, write_json
from espnet_mpq.text import TEXT_FORMATS, guess_format

EXAMPLE = """\
examples:
  mpq overlap --test dump/raw/test_clean/text dump/raw/test_other/text --text lm_train.txt.gz
  mpq overlap --test test=nbest.jsonl.gz --text books.txt.xz --fail_above 0.1 --json overlap.json

An LM that was trained on the sentences of its test set gives word error rates that are too good
to be true. Counted are sentences of the test set that are a line of the text, and 8-grams of the
test set that occur in a line of it; both exactly, words compared as the scoring compares them
(mpq compare). The text is read line by line: memory grows with the test sets only.

Exit status: 0, or 3 where a limit is exceeded (a recipe can stop on it), 1 for an error.
"""
FORMAT_NAME, VERSION = "espnet_mpq.overlap", 1
LIMIT_STATUS = 3
HEAD_N_LINES = 10_000  # by which the format of a text is guessed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add(
        "--test",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="references of test sets: `utt words`, trn or plain lines, or n-best JSON lines "
        "(.jsonl) with references",
    )
    add("--text", nargs="+", required=True, metavar="FILE", help="text of the LM (.gz and .xz too)")
    add(
        "--text_format",
        choices=TEXT_FORMATS,
        default="auto",
        help="of --text: plain sentences, or kaldi (`utt words`)",
    )
    add("--test_format", choices=hypotheses.FILE_FORMATS, default="auto", help="of --test")
    add("--n", type=int, default=N, help="words of an n-gram (default: %(default)s)")
    add(
        "--min_words",
        type=int,
        default=MIN_WORDS,
        help="shorter sentences are counted apart and under no limit (default: %(default)s)",
    )
    add(
        "--fail_above",
        type=float,
        metavar="PERCENT",
        help="exit with status 3 if more than this share of a test set's sentences, or of its "
        "n-grams, is in the text",
    )
    add(
        "--max_sentences",
        type=int,
        metavar="N",
        help="exit with status 3 if more than N sentences of a test set are lines of the text",
    )
    add("--n_examples", type=int, default=5, help="printed for a test set")
    add("--unit", choices=UNITS, default="word", help="char: characters instead of words")
    add("--case_sensitive", action="store_true", help="A is not a")
    add("--non_linguistic_symbols", metavar="FILE", help="symbols, one a line, left out")
    add("--json", help="write all numbers, and everything that was found, to this file")


def main(args: argparse.Namespace) -> int:
    """Print what was found; the exit status says whether a limit is exceeded."""
    if args.fail_above is not None and not 0 <= args.fail_above <= 100:
        raise InputError("--fail_above", found=args.fail_above, expected="0 .. 100 percent")
    if args.max_sentences is not None and args.max_sentences < 0:
        raise InputError("--max_sentences", found=args.max_sentences, expected="at least 0")
    symbols = read_symbols(args.non_linguistic_symbols) if args.non_linguistic_symbols else ()
    result = measure(
        dict(_distinct(named(args.test))),
        args.text,
        text_format=args.text_format,
        test_format=args.test_format,
        n=args.n,
        min_words=args.min_words,
        fail_above=args.fail_above,
        max_sentences=args.max_sentences,
        scoring=Scoring(args.unit, args.case_sensitive, frozenset(symbols)),
    )
    inputs = {f"test {name}": path for name, path in named(args.test)}
    inputs.update({f"text {k}": path for k, path in enumerate(args.text, 1)})
    result["provenance"] = provenance(args, inputs)
    print(to_text(result, args.n_examples))
    if args.json:
        write_json(args.json, result)
    return LIMIT_STATUS if result["exceeded"] else 0


def measure(
    tests: Dict[str, str],
    texts: Sequence[str],
    *,
    text_format: str = "auto",
    test_format: str = "auto",
    n: int = N,
    min_words: int = MIN_WORDS,
    fail_above: Optional[float] = None,
    max_sentences: Optional[int] = None,
    scoring: Optional[Scoring] = None,
) -> dict:
    """All numbers of `evaluate.overlap.overlaps` for files, as `--json` writes them.

    Args:
        tests: name -> file with references.
        texts: files of the language model's text.
        fail_above: percent of sentences or n-grams of a test set; max_sentences: sentences.

    Returns:
        {"tests": {name: counts, "sentence_percent", "ngram_percent", "sentences": [...]},
        "text": lines and words, "exceeded": [a sentence for each limit that is exceeded]}.

    Raises:
        InputError: unreadable files, test sets without a word.
    """
    scoring = scoring or Scoring()
    read = {name: _read_test(path, test_format, scoring) for name, path in tests.items()}
    lines = itertools.chain.from_iterable(_lines(path, text_format, scoring) for path in texts)
    found, searched = overlaps(read, lines, n=n, min_words=min_words)
    if not searched.n_words:
        raise InputError("the text has no word", found=", ".join(map(str, texts)))
    exceeded = []
    for name, one in found.items():
        for percent, what in (
            (one.sentence_percent, "sentences"),
            (one.ngram_percent, f"{n}-grams"),
        ):
            if fail_above is not None and percent > fail_above:
                exceeded.append(f"{percent:.3g} % of the {what} of {name}, limit {fail_above:g} %")
        if max_sentences is not None and one.n_found_sentences > max_sentences:
            exceeded.append(f"{one.n_found_sentences} sentences of {name}, limit {max_sentences}")
    return {
        "format": FORMAT_NAME,
        "version": VERSION,
        "text": {"n_lines": searched.n_lines, "n_words": searched.n_words},
        "tests": {
            name: {
                "sentence_percent": one.sentence_percent,
                "ngram_percent": one.ngram_percent,
                **dataclasses.asdict(one),
            }
            for name, one in found.items()
        },
        "exceeded": exceeded,
    }


def _distinct(pairs: List[tuple]) -> List[tuple]:
    """(name, path), names that repeat (test_clean/text, test_other/text) made longer."""
    names = [name for name, _ in pairs]
    longer = [(str(p) if names.count(name) > 1 else name, p) for name, p in pairs]
    if len(dict(longer)) < len(longer):
        raise InputError("two test sets have one name", found=", ".join(names), todo="NAME=FILE")
    return longer


def _read_test(path, file_format: str, scoring: Scoring) -> Dict[str, List[str]]:
    suffixes = "".join(path.suffixes) if hasattr(path, "suffixes") else str(path)
    if ".jsonl" in suffixes:
        from espnet_mpq.decode.nbest import read_nbest

        lists = read_nbest(path)
        missing = [one.utt for one in lists if one.ref is None]
        if missing:
            raise InputError(f"{path} has lists without a reference", found=missing[0])
        return {one.utt: scoring.tokens(one.ref.split()) for one in lists}
    return hypotheses.read_transcripts(path, file_format, scoring)


def _lines(path, text_format: str, scoring: Scoring) -> Iterator[Line]:
    """(place, tokens) of the lines of a text."""
    lines = enumerate(stream_lines(path), 1)
    if text_format == "auto":
        head = list(itertools.islice(lines, HEAD_N_LINES))
        text_format, _ = guess_format([line for _, line in head if line.strip()])
        lines = itertools.chain(head, lines)
    n_names = int(text_format == "kaldi")
    name = str(path)
    for number, line in lines:
        words = line.split()
        if len(words) > n_names:
            yield (name, number), scoring.tokens(words[n_names:])


def to_text(result: dict, n_examples: int = 5) -> str:
    """The counts as a few lines for people, with examples."""
    text = result["text"]
    lines = [f"text: {text['n_lines']:,} lines, {text['n_words']:,} words"]
    for name, one in result["tests"].items():
        lines += [
            f"{name}: {one['n_found_sentences']} of {one['n_sentences']:,} sentences"
            f" ({one['sentence_percent']:.3g} %) are lines of the text; shorter than"
            f" {one['min_words']} words, not under the limits: {one['n_found_short_sentences']} of"
            f" {one['n_short_sentences']:,}",
            f"  {one['n_found_ngrams']} of {one['n_ngrams']:,} {one['n']}-grams"
            f" ({one['ngram_percent']:.3g} %) occur in it, in {one['n_touched_sentences']}"
            f" sentences; they cover {one['n_covered_words']} of {one['n_words']:,} words",
        ]
        for found in one["sentences"][:n_examples]:
            what = "" if found["whole"] else f"{len(found['words'])} of {found['n_words']} words "
            path, number = found["place"]
            lines.append(f"    {found['utt']}: {what}{' '.join(found['words'])}")
            lines.append(f"      {path}, line {number}")
        more = len(one["sentences"]) - n_examples
        if more > 0:
            lines.append(f"    and {more} more (--json FILE has all)")
    for limit in result["exceeded"]:
        lines.append(f"too much of a test set is in the text: {limit}")
    if result["exceeded"]:
        lines.append("leave these lines out of the text and train again, or raise the limit")
    return "\n".join(lines)
