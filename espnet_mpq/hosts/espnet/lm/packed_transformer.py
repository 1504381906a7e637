"""mpq_packed_transformer: a packed Transformer LM as the host's decoders see it."""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import torch
from espnet2.lm.abs_model import AbsLM
from espnet2.lm.transformer_lm import TransformerLM

from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.lm.packed import PackedHostLm
from espnet_mpq.runtime.prefixes import Prefix
from espnet_mpq.runtime.transformer_lm import PackedTransformer


class MpqPackedTransformerLM(PackedHostLm, TransformerLM):
    """Scores with codes and scales; same calls as the host's TransformerLM, states of its own.

    A TransformerLM by class, because the host's transducer searches ask for it, but without its
    layers. A state is the Prefix of one hypothesis, or None at its start; states of different
    lengths may meet in a batch.

    Args:
        plan: the JSON form of the plan, as `mpq pack` wrote it to lm_conf.
        pos_enc, embed_unit, att_unit, head, unit, layer: as in the host.

    Raises:
        PlanError, InputError: the plan or the sizes cannot be.
    """

    RUNTIME = PackedTransformer
    packed: PackedTransformer

    def __init__(
        self,
        vocab_size: int,
        plan: dict,
        pos_enc: Optional[str] = None,
        embed_unit: int = 128,
        att_unit: int = 256,
        head: int = 2,
        unit: int = 1024,
        layer: int = 4,
    ):
        AbsLM.__init__(self)  # not TransformerLM's, which would make all layers
        conf = {"pos_enc": pos_enc, "embed_unit": embed_unit, "att_unit": att_unit}
        conf.update(head=head, unit=unit, layer=layer)
        self.build("mpq_packed_transformer", conf, vocab_size, plan)

    def forward(self, input: torch.Tensor, hidden: None) -> Tuple[torch.Tensor, None]:
        """Logits (B, T, V) after token ids (B, T) and None, as the host."""
        return self.packed.logits(input)

    def score(
        self, y: torch.Tensor, state: Optional[Prefix], x: Any
    ) -> Tuple[torch.Tensor, Prefix]:
        """Log-probabilities (V,) of the next token after prefix ``y`` (1-D), and its state."""
        log_probs, states = self.batch_score(y.unsqueeze(0), [state], x)
        return log_probs.squeeze(0), states[0]

    def batch_score(
        self, ys: torch.Tensor, states: Sequence[Optional[Prefix]], xs: Any
    ) -> Tuple[torch.Tensor, List[Prefix]]:
        """Log-probabilities (B, V) after prefixes ``ys`` (B, length), one state a hypothesis.

        Tokens that a state has not seen yet are computed first, so that a search may start
        with more than one token and any state may be None.

        Raises:
            InputError: a state that has seen the newest token already.
        """
        length = ys.shape[1]
        prefixes = [() if state is None else state for state in states]
        if any(len(prefix) >= length for prefix in prefixes):
            raise InputError(
                "the state of another hypothesis",
                found=f"states of {sorted({len(prefix) for prefix in prefixes})} tokens",
                expected=f"fewer than the {length} tokens of the hypotheses",
            )
        for seen in range(min(map(len, prefixes), default=length), length - 1):
            rows = [row for row, prefix in enumerate(prefixes) if len(prefix) == seen]
            _, grown = self.packed.step(ys[rows, seen], [prefixes[row] for row in rows])
            for row, prefix in zip(rows, grown):
                prefixes[row] = prefix
        return self.packed.step(ys[:, -1], prefixes)
