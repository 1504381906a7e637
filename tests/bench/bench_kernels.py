"""Latency of one LM step: packed kernels against the host's fp32 LM and PyTorch's dynamic int8.

TABLE
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from espnet_mpq.kernels import dispatch
from espnet_mpq.lm.rnn import PackedRnn
from espnet_mpq.plan import ClusterSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from packed_models import FloatRnn, architecture, packed_model, random_weights, uniform  # noqa: E402


class StepOfModules(torch.nn.Module):
    """tokens (B,), state -> log-probabilities (B, V), state, with torch's own modules."""

    def __init__(self, arch, dynamic_int8: bool):
        super().__init__()
        self.model = FloatRnn(arch, random_weights(arch))
        if dynamic_int8:
            kinds = {torch.nn.LSTM, torch.nn.Linear}
            self.model = torch.ao.quantization.quantize_dynamic(self.model, kinds)

    @torch.no_grad()
    def forward(self, tokens, state):
        hidden, state = self.model.rnn(self.model.encoder(tokens[:, None]), state)
        return self.model.decoder(hidden)[:, 0].log_softmax(-1), state


def host_lm(arch, lm_class):
    lm = lm_class(
        arch.vocab_size, unit=arch.unit, nhid=arch.nhid, nlayers=arch.nlayers, rnn_type="lstm"
    ).eval()
    values = random_weights(arch)
    lm.load_state_dict(values)
    return lm


def step_of_host(lm):
    """The host's batch_score as its beam search calls it: a list of states in and out."""

    @torch.no_grad()
    def step(tokens, state):
        state = [None] * len(tokens) if state is None else state
        return lm.batch_score(tokens[:, None], state, None)

    return step


def systems(arch, bits, with_host: bool) -> dict:
    """name -> step(tokens, state)."""
    found = {}
    if with_host:
        from espnet2.lm.seq_rnn_lm import SequentialRNNLM

        found["fp32"] = step_of_host(host_lm(arch, SequentialRNNLM))
    else:
        found["fp32"] = StepOfModules(arch, False)
    found["int8"] = StepOfModules(arch, True)
    for b in bits:
        packed = packed_model(arch, uniform(arch, ClusterSpec(b)))
        if with_host:
            from espnet_mpq.hosts.espnet.lm_packed import MpqPackedRNNLM

            a = arch
            lm = MpqPackedRNNLM(a.vocab_size, packed.plan.to_dict(), a.unit, a.nhid, a.nlayers)
            lm.load(packed)
            found[f"{b} bit"] = step_of_host(lm)
        else:
            runtime = PackedRnn(arch, packed.plan)
            runtime.load(packed)
            found[f"{b} bit"] = runtime.step
    return found


def latency_s(step, tokens, least_s: float) -> float:
    """Seconds per step, each step going on from the state of the one before."""
    _, state = step(tokens, None)
    n, start_s = 0, time.perf_counter()
    while n < 3 or time.perf_counter() - start_s < least_s:
        _, state = step(tokens, state)
        n += 1
    return (time.perf_counter() - start_s) / n


def measure(steps: dict, vocab_size: int, batch: int, n_rounds: int, least_s: float) -> dict:
    """name -> median seconds per step; every round runs all systems in turn."""
    tokens = torch.randint(0, vocab_size, (batch,))
    found = {name: [] for name in steps}
    for step in steps.values():
        latency_s(step, tokens, 0.0)
    for _ in range(n_rounds):
        for name, step in steps.items():
            found[name].append(latency_s(step, tokens, least_s))
    return {name: statistics.median(values) for name, values in found.items()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(arguments=None) -> dict:
    """Print the table; returns (vocab_size, batch) -> name -> seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="seconds, a tiny LM, no host")
    parser.add_argument("--units", type=int, default=650)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, nargs="+", default=[5000, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 10, 20, 60])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--least_s", type=float, default=0.05, help="seconds a measurement")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.smoke:
        args.units, args.vocab, args.batch = 24, [50], [1, 3]
        args.rounds, args.least_s = 1, 0.0
    with_host = not args.smoke and importlib.util.find_spec("espnet2") is not None
    fp = "ESPnet fp32" if with_host else "torch fp32"
    print(f"{cpu_name()}, torch {torch.__version__}, 1 thread, kernel {dispatch.choose()}")
    results = {}
    for vocab_size in args.vocab:
        arch = architecture("lstm", vocab_size, args.units, args.units, args.layers)
        steps = systems(arch, args.bits, with_host)
        print(f"\n{args.layers} x {args.units}, vocabulary {vocab_size:,}; ms per step")
        print(f"{'batch':>5}{fp:>13}{'torch int8':>12}" + "".join(f"{b:>7} bit" for b in args.bits))
        for batch in args.batch:
            found = measure(steps, vocab_size, batch, args.rounds, args.least_s)
            results[vocab_size, batch] = found
            ours = "".join(f"{1e3 * found[f'{b} bit']:>11.3f}" for b in args.bits)
            print(
                f"{batch:>5}{1e3 * found['fp32']:>13.3f}{1e3 * found['int8']:>12.3f}{ours}",
                flush=True,
            )
            if 2 in args.bits:
                two = found["2 bit"]
                text = f"{found['fp32'] / two:.1f}x fp32, {found['int8'] / two:.1f}x int8"
                print(f"{'':>5}  2 bit: {text}", flush=True)
    return results


if __name__ == "__main__":
    main()
