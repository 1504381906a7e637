"""One step of a Transformer LM in a beam: batch_score of the host's LM against the packed ones."""

from __future__ import annotations

import time
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from bench.lm_systems import HOST, INT8, random_packed
from bench.timing import alternate
from packed_models import transformer

from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.hosts.espnet.families import conf_of

N_STEPS = 5  # timed from a prefix length on; one more before them is not
# Decoding AN4 (egs/an4/mpq1), the prefixes of ten hypotheses held 71, 88 and 113 distinct tokens at
# lengths 16, 20 and 24; 5 makes it 79, 91 and 102. Random parents alone (1) would share too much.
TURNOVER = 5


def sized(name: str, vocab_size: int) -> TransformerArchitecture:
    """ "6x512" -> layers x attention units; heads of 64, embedding and inner width as in ESPnet's
    recipes (128 units, four times the attention units)."""
    layers, width = map(int, name.split("x"))
    return transformer(vocab_size, None, 128, width, max(1, width // 64), 4 * width, layers)


class Beam:
    """The hypotheses of a search whose choices are random and the same for every LM.

    Args:
        batch: hypotheses.
        length: tokens of a prefix at the first timed step, at least 2.
        shared: all grow from one, and at every step one in TURNOVER of them is given up for a
            second continuation of a random one; else no two prefixes have a token in common, as
            if every hypothesis were of another utterance.
    """

    def __init__(self, batch: int, length: int, vocab_size: int, shared: bool):
        self.length = length
        n_roots = 1 if shared else batch
        own = torch.arange(batch)
        self.parents: List[List[int]] = []  # [n]: of the prefixes of n + 2 tokens
        self.ys: List[torch.Tensor] = [torch.randint(1, vocab_size, (n_roots, 1))]
        origins = [own[:n_roots, None]]  # equal where prefixes have the same token in common
        for n in range(1, length + N_STEPS - 1):
            parents = own
            if shared:
                given_up = torch.rand(batch) < 1 / TURNOVER
                parents = torch.where(given_up, torch.randint(0, batch, (batch,)), own) % n_roots
                n_roots = batch
            self.parents.append(parents.tolist())
            tokens = torch.randint(1, vocab_size, (batch, 1))
            self.ys.append(torch.cat([self.ys[-1][parents], tokens], dim=1))
            origins.append(torch.cat([origins[-1][parents], own[:, None] + n * batch], dim=1))
        self.n_distinct = len(origins[length - 1].unique())  # tokens of all prefixes, shared once

    def grown(self, lm, states: Sequence, n: int) -> List:
        """The states of the survivors after scoring the prefixes of ``n`` tokens."""
        _, states = lm.batch_score(self.ys[n - 1], states, None)
        return [states[parent] for parent in self.parents[n - 1]]

    def states(self, lm, walk: bool) -> List:
        """Of prefixes with two tokens less than ``length``.

        walk: token by token as a search does, so that an LM can share what hypotheses share;
            else at once, which gives the host's LM the same states sooner.
        """
        n_seen = self.length - 2
        if n_seen and not walk:
            return self.grown(lm, [None] * len(self.ys[n_seen - 1]), n_seen)
        states: List = [None] * len(self.ys[0])
        for n in range(1, n_seen + 1):
            states = self.grown(lm, states, n)
        return states

    @torch.no_grad()
    def seconds(self, lm, states: List, least_s: float, clock: Callable[[], float]) -> float:
        """Seconds a step, of N_STEPS from ``length`` on, again and again from ``states``."""
        n_steps, total_s = 0, 0.0
        while not n_steps or total_s < least_s:
            # Not timed: where the LM finds the states is as in a search.
            beam = self.grown(lm, states, self.length - 1)
            start_s = clock()
            for n in range(self.length, self.length + N_STEPS - 1):
                beam = self.grown(lm, beam, n)
            lm.batch_score(self.ys[-1], beam, None)
            total_s += clock() - start_s
            n_steps += N_STEPS
        return total_s / n_steps


def typical_beam(*args) -> Beam:
    """Of many beams, by arguments of Beam, the one that shares a median number of tokens."""
    return sorted((Beam(*args) for _ in range(21)), key=lambda beam: beam.n_distinct)[10]


def host_lm(arch: TransformerArchitecture):
    """The host's float LM with the host's own random weights."""
    from espnet2.lm.transformer_lm import TransformerLM

    conf = dict(att_unit=arch.att_unit, head=arch.head, unit=arch.unit, layer=arch.layer)
    lm = TransformerLM(arch.vocab_size, arch.pos_enc, arch.embed_unit, **conf)
    return lm.eval()


def packed_lm(arch: TransformerArchitecture, bits: int):
    """The packed LM as the host's searches see it."""
    from espnet_mpq.hosts.espnet.lm.packed_transformer import MpqPackedTransformerLM

    packed = random_packed(arch, bits)
    lm = MpqPackedTransformerLM(arch.vocab_size, packed.plan.to_dict(), **conf_of(arch))
    lm.load(packed)
    return lm


def systems(arch: TransformerArchitecture, bits: Sequence[int]) -> Dict[str, Tuple]:
    """name -> LM, and whether its states are walked."""
    lm = host_lm(arch)
    int8 = torch.ao.quantization.quantize_dynamic(lm, {torch.nn.Linear})
    found = {HOST: (lm, False), INT8: (int8, False)}
    return {**found, **{f"{b} bit": (packed_lm(arch, b), True) for b in bits}}


@torch.no_grad()
def measure(
    lms: Dict[str, Tuple],
    beam: Beam,
    n_rounds: int,
    least_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Dict[str, float]:
    """System -> median seconds of a step, one thread."""
    torch.set_num_threads(1)
    measures = {}
    for name, (lm, walk) in lms.items():
        states = beam.states(lm, walk)
        beam.seconds(lm, states, 0.0, clock)  # warm up: weights are repacked at the first step
        measures[name] = lambda lm=lm, states=states: beam.seconds(lm, states, least_s, clock)
    return alternate(measures, n_rounds)
