"""Loss of post-training quantization by rounding: to the nearest levels, and by second order.

    python tests/bench/bench_rounding.py --lm_exp EXP --text train.txt --test test.txt

Nats per token above the fp LM on text that nothing was fitted to, the same bits everywhere (row
scales in float16), and the CPU seconds of the rounding. ESPnet LSTM LM 2 x 650, BPE 2,000, trained
on 1.2 million tokens of novels (learning rate to 0), perplexity 98.8 on 10,000 tokens of another
novel; 20,000 tokens for the rounding; one seed, one core of a busy machine:

    bits  nearest  second order  removed  without biases  CPU s
       4   0.0151        0.0036   75.9 %          0.0052     76
       2   0.2337        0.0668   71.4 %          0.1100    102
       1   1.0987        0.4058   63.1 %          1.0913     81

What makes it, on the same LM after a sixth of its training (2 bits, 6,000 tokens of the novel; of
0.1163 lost by the nearest levels): GPTQ with separate inputs, W' W for the embedding 86.9 %
removed; W | U joined, coordinate descent, biases, in order 88.9 %; the embedding by the curvature
of the loss 89.1 %, rounded plainly 76.1 %; matrices changed towards the float outputs first 93.8 %.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch

from espnet_mpq.bin.material import open_text
from espnet_mpq.bin.rounding import make_rounder
from espnet_mpq.plan import uniform_plan
from espnet_mpq.training.on_grid import project, stored_mats

HEADINGS = ("bits", "scales", "nearest", "second order", "removed", "without biases", "CPU s")


def main(argv: Optional[Sequence[str]] = None) -> List[Dict]:
    """Measure and print the table; returns its rows."""
    args = _parse(argv)
    import espnet_mpq
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.hosts.espnet.lm.judged import judged_lm

    espnet_mpq.register()
    exp = load_fp_lm(args.lm_exp, args.lm_file)
    weights, clusters = exp.weights, exp.architecture.clusters()
    test = judged_lm(exp, open_text(exp, args.test, "auto", args.test_tokens, 2), 3000)
    rounder = make_rounder(exp, "second_order", args.rounding_tokens, (args.text, "auto", 0))
    parameters = dict(exp.module.named_parameters())
    fp_weights = {name: p.detach().clone() for name, p in parameters.items()}
    fp = _nll(exp.module, test)
    print(f"fp perplexity {math.exp(fp):.3f} on {test.n_rows} tokens")
    print(" | ".join(HEADINGS), flush=True)

    def loss(mats, biases=()) -> float:
        with torch.no_grad():
            for name in mats:
                weights.set(name, mats[name])
            for name in biases:
                parameters[name].copy_(biases[name])
            nll = _nll(exp.module, test)
            for name, p in parameters.items():
                p.copy_(fp_weights[name])
        return nll - fp

    rows = []
    for bits in args.bits:
        for tying, group_size in _tyings(args):
            plan = uniform_plan(clusters, bits, tying=tying, group_size=group_size)
            mats = {n: [m.clone() for m in weights.mats(n)] for n in weights.clusters}
            nearest = loss(stored_mats(mats, project(mats, plan)))
            start = time.process_time()
            rounded = rounder.round_all(plan)
            seconds = time.process_time() - start
            ours, unbiased = loss(rounded.mats, rounded.biases), loss(rounded.mats)
            row = dict(bits=bits, scales=tying, nearest=nearest, second_order=ours)
            row.update(removed=1 - ours / nearest, without_biases=unbiased, cpu_s=seconds)
            rows.append(row)
            print(
                f"{bits} | {tying} | {nearest:.4f} | {ours:.4f} | {100 * row['removed']:.1f} %"
                f" | {unbiased:.4f} | {seconds:.1f}",
                flush=True,
            )
    return rows


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lm_exp", type=Path, required=True, help="experiment of the fp LM")
    add("--lm_file", help="checkpoint (default: valid.loss.best.pth)")
    add("--text", required=True, help="text that the rounding looks at")
    add("--test", required=True, help="text to measure on")
    add("--bits", type=int, nargs="+", default=[4, 2, 1])
    add("--rounding_tokens", type=int, default=24000)
    add("--test_tokens", type=int, default=20000)
    add("--all_tyings", action="store_true", help="also groups of 64 and one scale a cluster")
    return parser.parse_args(argv)


def _tyings(args: argparse.Namespace):
    more = [("group", 64), ("cluster", None), ("model", None)] if args.all_tyings else []
    return [("row", None), *more]


@torch.no_grad()
def _nll(module, judged) -> float:
    """Nats per token, without dropout."""
    module.eval()
    pairs = zip(judged.logits(), judged.batches)
    return (
        sum(float(judged.cross_entropy(logits, batch)) for logits, batch in pairs) / judged.n_rows
    )


if __name__ == "__main__":
    main()
