"""The LM's share of a step of the host's BatchBeamSearch, fp32 against packed 2 bit.

The attention decoder, the CTC and the encoder's output are random: only their cost counts.
"""

from __future__ import annotations

import logging
import statistics
import time
from typing import Dict, Optional

import torch
from bench.lm_systems import float_weights, host_lm, packed_in_host, random_packed

from espnet_mpq.architecture.base import Architecture

# ESPnet's defaults; a wider decoder makes every LM's share smaller.
DECODER = dict(attention_heads=4, linear_units=2048, num_blocks=6)
WIDTH, N_FRAMES, BEAM_SIZE, N_TOKENS = 256, 250, 10, 15
WEIGHTS = dict(decoder=0.7, ctc=0.3, lm=0.6, length_bonus=0.0)


class Stopwatch:
    """Seconds spent inside some methods of an object, none of which calls another; and calls."""

    def __init__(self, thing, names, clock=time.perf_counter):
        self.seconds, self.n_calls, self.clock = 0.0, 0, clock
        for name in names:
            # nn.Module lets a plain function of the instance hide the method.
            object.__setattr__(thing, name, self._timed(getattr(thing, name)))

    def _timed(self, function):
        def call(*args, **kwargs):
            self.n_calls += 1
            start_s = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.clock() - start_s

        return call


class Search:
    """One utterance searched with one LM.

    Args:
        lm: an LM of the host, or None.
        smoke: a tiny decoder.
    """

    def __init__(self, lm, vocab_size: int, smoke: bool = False):
        from espnet.nets.batch_beam_search import BatchBeamSearch
        from espnet.nets.scorers.ctc import CTCPrefixScorer
        from espnet.nets.scorers.length_bonus import LengthBonus
        from espnet2.asr.ctc import CTC
        from espnet2.asr.decoder.transformer_decoder import TransformerDecoder

        logging.getLogger("espnet").setLevel(logging.ERROR)  # it warns of the length limit
        torch.manual_seed(0)
        width, eos = 16 if smoke else WIDTH, vocab_size - 1
        conf = dict(attention_heads=2, linear_units=16, num_blocks=1) if smoke else DECODER
        self.n_tokens = 4 if smoke else N_TOKENS
        self.encoded = torch.randn(20 if smoke else N_FRAMES, width)
        scorers = dict(
            decoder=TransformerDecoder(vocab_size, width, **conf).eval(),
            ctc=CTCPrefixScorer(CTC(vocab_size, width).eval(), eos),
            length_bonus=LengthBonus(vocab_size),
        )
        self.in_lm: Optional[Stopwatch] = None
        if lm is not None:
            self.in_lm = Stopwatch(lm, ("batch_score", "select_state", "batch_init_state"))
            scorers["lm"] = lm
        self.search = BatchBeamSearch(
            beam_size=BEAM_SIZE,
            vocab_size=vocab_size,
            weights=WEIGHTS,
            scorers=scorers,
            sos=eos,
            eos=eos,
            pre_beam_score_key="full",
        ).eval()
        self.steps = Stopwatch(self.search, ("search",))

    @torch.no_grad()
    def run(self) -> Dict[str, float]:
        """Seconds per step: of all, and of the LM's own methods."""
        watch, steps = self.in_lm, self.steps
        lm_s, n_steps, start_s = watch.seconds if watch else 0.0, steps.n_calls, time.perf_counter()
        self.search(self.encoded, maxlenratio=self.n_tokens / len(self.encoded))
        all_s, n_steps = time.perf_counter() - start_s, steps.n_calls - n_steps
        lm_s = watch.seconds - lm_s if watch else 0.0
        return {"step_s": all_s / n_steps, "lm_s": lm_s / n_steps, "n_steps": n_steps}


def shares(arch: Architecture, n_rounds: int, smoke: bool = False) -> Dict[str, dict]:
    """LM -> median seconds of a step of the search and of the LM in it, and its share."""
    packed = random_packed(arch, 2)
    lms = {
        "no LM": None,
        "fp32": host_lm(arch, float_weights(arch)),
        "2 bit": packed_in_host(arch, packed),
    }
    searches = {name: Search(lm, arch.vocab_size, smoke) for name, lm in lms.items()}
    found = {name: [] for name in searches}
    for k in range(n_rounds + 1):
        for name, search in searches.items():
            measured = search.run()
            if k:  # the first is to warm up
                found[name].append(measured)
    return {name: _medians(rows) for name, rows in found.items()}


def _medians(rows) -> dict:
    row = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {**row, "share": row["lm_s"] / row["step_s"]}
