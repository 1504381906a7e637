"""Print the LM scale with the fewest word errors on the dev set (ties: the smaller)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from espnet_mpq.evaluate import hypotheses, wer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: utils/best_scale.py --ref data/dev/text --decode_dir exp/decode 0.2 0.4",
    )
    parser.add_argument("--ref", required=True, help="references, lines 'utt words...'")
    parser.add_argument("--decode_dir", type=Path, required=True, help="holds dev_fp_SCALE/")
    parser.add_argument("scales", nargs="+")
    args = parser.parse_args()
    ref = hypotheses.read_transcripts(args.ref, "kaldi")
    n_errors = {}
    for scale in args.scales:
        text = args.decode_dir / f"dev_fp_{scale}" / "1best_recog" / "text"
        hyp = hypotheses.read_transcripts(text, "kaldi")
        _, refs, hyps = hypotheses.pair(ref, {scale: hyp})
        counts = wer.wer(refs, hyps[scale])
        n_errors[scale] = counts.n_errors
        print(f"LM scale {scale}: dev WER {counts.wer_percent:.2f} %", file=sys.stderr)
    print(min(args.scales, key=lambda scale: (n_errors[scale], float(scale))))


if __name__ == "__main__":
    main()
