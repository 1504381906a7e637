"""Latency of one LM step: packed kernels against the host's fp32 LM and PyTorch's dynamic int8.

The host's LM and "batch_score" take and give a list of states, one a hypothesis, as the host's
beam search does; PyTorch's int8 and the packed columns take stacked states.

Measured 2026-11-20 with --cpu_time (seconds of the thread: a machine of two cores with a load of 4,
so with shared caches), Intel Xeon with AVX-512 VNNI, torch 2.13.0, path avx512; not yet
repeated on an idle machine:

    2 x 650, vocabulary 5,000; ms per step
    batch  ESPnet fp32  torch int8      1 bit      2 bit      4 bit      8 bit
        1        6.979       0.790      0.111      0.186      0.295      0.485
           2 bit: 4.2x torch int8; batch_score 0.262, 26.6x ESPnet fp32
       10       10.395       1.220      0.582      0.574      0.683      0.862
           2 bit: 2.1x torch int8; batch_score 0.695, 15.0x ESPnet fp32
       20       10.961       1.651      1.062      1.149      1.161      1.356
           2 bit: 1.4x torch int8; batch_score 1.358, 8.1x ESPnet fp32
       60       16.767       4.079      2.785      3.034      3.216      3.479
           2 bit: 1.3x torch int8; batch_score 3.550, 4.7x ESPnet fp32

    2 x 650, vocabulary 16; ms per step
    batch  ESPnet fp32  torch int8      1 bit      2 bit      4 bit      8 bit
        1        5.603       0.582      0.075      0.114      0.215      0.363
           2 bit: 5.1x torch int8; batch_score 0.189, 29.7x ESPnet fp32
       10        6.972       0.848      0.397      0.403      0.505      0.619
           2 bit: 2.1x torch int8; batch_score 0.536, 13.0x ESPnet fp32
       20        8.382       1.208      0.736      0.815      0.840      0.940
           2 bit: 1.5x torch int8; batch_score 1.016, 8.2x ESPnet fp32
       60       12.661       2.931      1.940      2.016      2.171      2.243
           2 bit: 1.5x torch int8; batch_score 2.525, 5.0x ESPnet fp32
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
        runtime = PackedRnn(arch, packed.plan)
        runtime.load(packed)
        found[f"{b} bit"] = runtime.step
        if with_host and b == 2:
            from espnet_mpq.hosts.espnet.lm_packed import MpqPackedRNNLM

            a = arch
            lm = MpqPackedRNNLM(a.vocab_size, packed.plan.to_dict(), a.unit, a.nhid, a.nlayers)
            lm.load(packed)
            found["2 bit in the host"] = step_of_host(lm)
    return found


def latency_s(step, tokens, least_s: float, clock) -> float:
    """Seconds per step, each step going on from the state of the one before."""
    _, state = step(tokens, None)
    n, start_s = 0, clock()
    while n < 3 or clock() - start_s < least_s:
        _, state = step(tokens, state)
        n += 1
    return (clock() - start_s) / n


def measure(steps: dict, vocab_size: int, batch: int, n_rounds: int, least_s: float, clock) -> dict:
    """name -> median seconds per step; every round runs all systems in turn."""
    tokens = torch.randint(0, vocab_size, (batch,))
    found = {name: [] for name in steps}
    for step in steps.values():
        latency_s(step, tokens, 0.0, clock)
    for _ in range(n_rounds):
        for name, step in steps.items():
            found[name].append(latency_s(step, tokens, least_s, clock))
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
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count the time of this thread alone: for a machine that does other work too",
    )
    args = parser.parse_args(arguments)
    clock = time.thread_time if args.cpu_time else time.perf_counter
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
            found = measure(steps, vocab_size, batch, args.rounds, args.least_s, clock)
            results[vocab_size, batch] = found
            ours = "".join(f"{1e3 * found[f'{b} bit']:>11.3f}" for b in args.bits)
            print(
                f"{batch:>5}{1e3 * found['fp32']:>13.3f}{1e3 * found['int8']:>12.3f}{ours}",
                flush=True,
            )
            if 2 in args.bits:
                text = f"2 bit: {found['int8'] / found['2 bit']:.1f}x torch int8"
                in_host = found.get("2 bit in the host", found["2 bit"])
                text += f"; batch_score {1e3 * in_host:.3f}, {found['fp32'] / in_host:.1f}x {fp}"
                print(f"{'':>5}  {text}", flush=True)
    return results


if __name__ == "__main__":
    main()
