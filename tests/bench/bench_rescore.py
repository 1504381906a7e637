"""Milliseconds a hypothesis of n-best rescoring: packed, fp32 with a prefix tree, one by one.

Usage:
    python tests/bench/bench_rescore.py NBEST.jsonl.gz [--n_lists 100] [--layers 2 --unit 650]
    python tests/bench/bench_rescore.py --huge 1000000      one list of a million hypotheses

LMs have random weights over the tokens of the lists; all systems score the same hypotheses, in
turn, on one thread. "one by one" is the host's own model and loss (ESPnetLanguageModel.nll), a
hypothesis a call. Times are of the thread's CPU, so that other programs on the machine disturb
little; they leave out reading files and making tokens.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.lm_systems import float_weights, host_lm, packed_runtime, random_packed  # noqa: E402
from bench.timing import machine, revision, today  # noqa: E402
from packed_models import architecture  # noqa: E402

from espnet_mpq.decode.nbest import read_nbest  # noqa: E402
from espnet_mpq.decode.prefix_tree import score_sequences  # noqa: E402

NAIVE, TREE = "ESPnet fp32, one by one", "fp32, prefix tree"


def sequences_of(lists) -> tuple:
    """(token ids with the sentence end, one array a hypothesis; tokens by id)."""
    texts = [text for one in lists for text in one.tokens or one.texts]
    tokens = sorted({token for text in texts for token in text.split()})
    ids = {token: i for i, token in enumerate(tokens, 2)}
    end = len(tokens) + 2
    return [numpy.array([*(ids[t] for t in text.split()), end]) for text in texts], end + 1


def systems(vocab_size: int, layers: int, unit: int, bits: List[int]) -> Dict[str, Callable]:
    """name -> score(sequences): total of every hypothesis."""
    from espnet2.lm.espnet_model import ESPnetLanguageModel

    from espnet_mpq.hosts.espnet.lm.scorer import FloatRnnSteps

    arch = architecture("lstm", vocab_size, unit, unit, layers)
    lm = host_lm(arch, float_weights(arch))
    model = ESPnetLanguageModel(lm, vocab_size).eval()

    @torch.no_grad()
    def one_by_one(sequences):
        found = []
        for sequence in sequences:
            ids = torch.from_numpy(sequence[:-1])[None]
            nll, _ = model.nll(ids, torch.tensor([ids.shape[1]]))
            found.append(-float(nll.sum()))
        return found

    def with_tree(lm):
        def score(sequences):
            found = [0.0] * len(sequences)
            for numbers, values in score_sequences(lm, sequences, vocab_size - 1):
                for i in numbers:
                    found[i] = float(values.sum())
            return found

        return score

    made = {NAIVE: one_by_one, TREE: with_tree(FloatRnnSteps(lm))}
    for b in bits:
        made[f"{b} bit, prefix tree"] = with_tree(packed_runtime(random_packed(arch, b)))
    return made


def measure(made: Dict[str, Callable], sequences, n_naive: int, n_rounds: int) -> Dict[str, float]:
    """name -> milliseconds a hypothesis, median of rounds; fp32 results are compared."""
    found: Dict[str, list] = {name: [] for name in made}
    for _ in range(n_rounds):
        totals = {}
        for name, score in made.items():
            chosen = sequences[:n_naive] if name == NAIVE else sequences
            start_s = time.thread_time()
            totals[name] = score(chosen)
            found[name].append(1e3 * (time.thread_time() - start_s) / len(chosen))
        for one, other in zip(totals[NAIVE], totals[TREE]):
            assert abs(one - other) < 1e-3, (one, other)
    return {name: statistics.median(values) for name, values in found.items()}


def table(ms: Dict[str, float]) -> str:
    """The measurements as Markdown."""
    lines = [f"| system | ms a hypothesis | {NAIVE} / | {TREE} / |", "| --- | ---: | ---: | ---: |"]
    for name, value in ms.items():
        lines.append(
            f"| {name} | {value:.3f} | {ms[NAIVE] / value:.1f}x | {ms[TREE] / value:.1f}x |"
        )
    return "\n".join(lines)


def huge(n_hyps: int, layers: int, unit: int, vocab_size: int = 2000) -> str:
    """Throughput and memory of one list of many hypotheses: 10 places with 2 to 5 choices each."""
    rng = numpy.random.default_rng(0)
    base = rng.integers(2, vocab_size - 1, 20).astype(numpy.int32)
    choices = rng.integers(2, vocab_size - 1, (20, 5)).astype(numpy.int32)
    sequences = []
    for _ in range(n_hyps):
        one = numpy.append(base, vocab_size - 1).astype(numpy.int32)
        at = rng.integers(5, 20, 5)
        one[at] = choices[at, rng.integers(0, 5, 5)]
        sequences.append(one)
    packed = packed_runtime(random_packed(architecture("lstm", vocab_size, unit, unit, layers), 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s, n = time.perf_counter(), 0
    for numbers, _ in score_sequences(packed, sequences, vocab_size - 1):
        n += len(numbers)
    wall_s = time.perf_counter() - start_s
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{n} hypotheses in one list: {n / wall_s:.0f} a second, {grown / 1024:.0f} MiB more"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nbest", nargs="?", help="n-best lists, best with tokens")
    parser.add_argument("--n_lists", type=int, default=100)
    parser.add_argument("--n_naive", type=int, default=50, help="hypotheses for the slow system")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--unit", type=int, default=650)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--huge", type=int, metavar="N", help="instead: one list of N hypotheses")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.huge:
        print(huge(args.huge, args.layers, args.unit))
    else:
        lists = read_nbest(args.nbest)[: args.n_lists]
        sequences, vocab_size = sequences_of(lists)
        made = systems(vocab_size, args.layers, args.unit, args.bits)
        prefixes = {tuple(s[:n]) for s in map(tuple, sequences) for n in range(len(s))}
        print(
            f"LSTM {args.layers} x {args.unit}, {vocab_size} tokens; {len(sequences)} hypotheses "
            f"of {len(lists)} lists, {sum(map(len, sequences)) / len(sequences):.1f} tokens and "
            f"{len(prefixes) / len(sequences):.1f} steps each\n"
        )
        print(table(measure(made, sequences, args.n_naive, args.rounds)))
    facts = machine()
    print(f"\n{facts['cpu']}, kernel {facts['kernel']}, one thread, {today()}, {revision()}")


if __name__ == "__main__":
    main()
