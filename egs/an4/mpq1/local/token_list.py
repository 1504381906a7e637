"""Write the token list, characters or sentencepiece units, in the host's order."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: local/token_list.py --text data/train/text --output data/token_list/char",
    )
    parser.add_argument("--text", type=Path, required=True, help="lines 'utt words...'")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for tokens.txt (and bpe.model)"
    )
    parser.add_argument("--token_type", choices=("char", "bpe"), default="char")
    parser.add_argument("--nbpe", type=int, default=100, help="number of sentencepiece units")
    args = parser.parse_args()

    lines = args.text.read_text().splitlines()
    sentences = [line.split(maxsplit=1)[1] for line in lines if " " in line]
    if not sentences:
        sys.exit(f"{args.text}: no line of the form 'utt words...'")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.token_type == "char":
        counts = Counter("".join(sentences))
        units = ["<space>" if char == " " else char for char, _ in counts.most_common()]
    else:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_prefix=str(args.output / "bpe"),
            vocab_size=args.nbpe,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=1,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(args.output / "bpe.model"))
        # the first three pieces are sentencepiece's own <unk>, <s>, </s>
        units = [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    tokens = ["<blank>", "<unk>", *units, "<sos/eos>"]
    (args.output / "tokens.txt").write_text("\n".join(tokens) + "\n")
    print(f"{args.output / 'tokens.txt'}: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
