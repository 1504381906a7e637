"""Mixed bits inside every layer, and scales of groups: LSTM stacks against the uniform ones."""

from __future__ import annotations

import time
from typing import Callable, Dict

import torch
from bench.lm_systems import packed_runtime, random_of_plan
from bench.timing import Step, alternate, latency_s
from packed_models import uniform

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.plan import ClusterSpec, Plan

GATE_BITS = {"i": 1, "f": 2, "g": 4, "o": 8}
GROUPS = (32, 64, 128)
GROUP_BITS = 2
MIXED = "mixed"


def group_name(group_size: int) -> str:
    return f"groups of {group_size}"


def mixed_plan(arch: Architecture) -> Plan:
    """Every layer with gates of 1, 2, 4 and 8 bits; embedding and output of 8, a scale a row."""
    names = [cluster.name for cluster in arch.clusters()]
    gates = {name: name.rsplit(".", 1)[-1] for name in names}
    return Plan({name: ClusterSpec(GATE_BITS.get(gates[name], 8)) for name in names})


def stack_steps(arch: Architecture) -> Dict[str, Step]:
    """ "1 bit" to "8 bit" and "mixed" with a scale a row, then 2 bit with scales of groups."""
    plans = {f"{b} bit": uniform(arch, ClusterSpec(b)) for b in GATE_BITS.values()}
    plans[MIXED] = mixed_plan(arch)
    for size in GROUPS:
        spec = ClusterSpec(GROUP_BITS, tying="group", group_size=size)
        plans[group_name(size)] = uniform(arch, spec)
    return {name: packed_runtime(random_of_plan(arch, plan)).step for name, plan in plans.items()}


def measure(
    steps: Dict[str, Step],
    vocab_size: int,
    batch: int,
    n_rounds: int,
    least_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, float]:
    """System -> median seconds of a step, one thread."""
    torch.set_num_threads(1)
    tokens = torch.randint(0, vocab_size, (batch,))
    for step in steps.values():
        latency_s(step, tokens, 0.0, clock)  # warm up: weights are repacked at the first step
    measures = {
        name: lambda step=step: latency_s(step, tokens, least_s, clock)
        for name, step in steps.items()
    }
    return alternate(measures, n_rounds)
