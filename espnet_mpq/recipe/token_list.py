"""Write a token list, characters, sentencepiece units or words, in the host's order."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import List, Sequence

from espnet_mpq.errors import MpqError
from espnet_mpq.io import read_lines


def characters(sentences: Sequence[str]) -> List[str]:
    """All characters, the most frequent first; a space is written <space>."""
    counts = Counter("".join(sentences))
    return ["<space>" if char == " " else char for char, _ in counts.most_common()]


def words(sentences: Sequence[str], n_units: int) -> List[str]:
    """The n_units most frequent words (of equally frequent ones the first by alphabet)."""
    counts = Counter(word for sentence in sentences for word in sentence.split())
    return sorted(counts, key=lambda word: (-counts[word], word))[:n_units]


def pieces(sentences: Sequence[str], n_units: int, output: Path) -> List[str]:
    """Train a unigram sentencepiece model, output/bpe.model; its pieces."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(output / "bpe"),
        vocab_size=n_units,
        model_type="unigram",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output / "bpe.model"))
    # the first three pieces are sentencepiece's own <unk>, <s>, </s>
    return [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python3 -m espnet_mpq.recipe.token_list --text data/train/text "
        "--output data/token_list/char",
    )
    parser.add_argument("--text", type=Path, required=True, help="lines 'utt words...'")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for tokens.txt (and bpe.model)"
    )
    parser.add_argument("--token_type", choices=("char", "bpe", "word"), default="char")
    parser.add_argument("--n_units", type=int, default=100, help="sentencepiece units or words")
    args = parser.parse_args()

    try:
        pairs = [line.rstrip().split(maxsplit=1) for line in read_lines(args.text)]
    except MpqError as error:
        sys.exit(str(error))
    sentences = [pair[1] for pair in pairs if len(pair) == 2]
    if not sentences:
        sys.exit(f"{args.text}: no line of the form 'utt words...'")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.token_type == "char":
        units = characters(sentences)
    elif args.token_type == "word":
        units = words(sentences, args.n_units)
    else:
        units = pieces(sentences, args.n_units, args.output)
    tokens = ["<blank>", "<unk>", *units, "<sos/eos>"]
    (args.output / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    print(f"{args.output / 'tokens.txt'}: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
