"""Milliseconds of an LM step by system, and how near the packed ones come to the machine's roof."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Dict, Optional, Sequence

import torch
from bench import onnx_lm, roof
from bench.lm_systems import lm_steps, n_code_bytes, n_macs
from bench.timing import alternate, latency_s

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.kernels import build, dispatch

# Below this batch the bytes of the codes may bound a step, and not its multiply-adds alone.
COMPUTE_BATCH = 10


def roof_measures(
    arch: Architecture, bits: Sequence[int], batch: int, n_threads: int, least_s: float
) -> Dict[str, Callable[[], float]]:
    """name -> the seconds that this machine needs at least for a step, measured anew each call.

    "macs": multiply-adds of the unpadded problem over the peak of the path's own instructions,
    the same for all bit-widths. Below COMPUTE_BATCH also "read 2" and so on: the bytes of the
    codes over the rate at which as many resident bytes are read. Empty where there is no roof
    (portable C++).
    """
    path = dispatch.choose()
    options = dict(n_threads=n_threads, least_s=max(least_s, 1e-3), n_rounds=1)
    try:
        if not roof.peak_macs_per_s(path, **options):
            return {}
    except build.BuildError:
        return {}
    macs = n_macs(arch) * batch

    def macs_s() -> float:
        # The threads of ONNX Runtime and OpenMP spin for a while on the cores that the roof needs.
        time.sleep(0.1 if n_threads > 1 else 0)
        return macs / roof.peak_macs_per_s(path, **options)

    measures = {"macs": macs_s}
    for b in bits if batch < COMPUTE_BATCH else ():
        n_bytes = n_code_bytes(arch, b)
        measures[f"read {b}"] = lambda n=n_bytes: n / roof.read_bytes_per_s(n, **options)
    return measures


def measure(
    arch: Architecture,
    steps: dict,
    bits: Sequence[int],
    batch: int,
    n_threads: int,
    n_rounds: int,
    least_s: float,
    clock: Callable[[], float] = time.perf_counter,
    with_roofs: bool = True,
) -> dict:
    """{"seconds": system -> median, "roof_s": as roof_measures}; roofs take their turns too."""
    tokens = torch.randint(0, arch.vocab_size, (batch,))
    measures = {
        name: lambda step=step: latency_s(step, tokens, least_s, clock)
        for name, step in steps.items()
    }
    for step in steps.values():
        latency_s(step, tokens, 0.0, clock)  # warm up: weights are repacked at the first step
    roofs = roof_measures(arch, bits, batch, n_threads, least_s) if with_roofs else {}
    found = alternate({**measures, **roofs}, n_rounds)
    return {
        "seconds": {name: found[name] for name in steps},
        "roof_s": {name: found[name] for name in roofs},
    }


def all_steps(
    arch: Architecture,
    bits: Sequence[int],
    n_threads: int,
    with_host: bool,
    onnx_work: Optional[Path],
) -> dict:
    """name -> step of every system; ``onnx_work`` None leaves ONNX Runtime out."""
    torch.set_num_threads(n_threads)
    steps = lm_steps(arch, bits, with_host)
    if onnx_work is not None:
        steps.update(onnx_lm.onnx_steps(arch, n_threads, onnx_work))
    return steps
