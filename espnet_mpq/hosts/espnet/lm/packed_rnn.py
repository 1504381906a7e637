"""mpq_packed_rnn: a packed recurrent LM as the host's decoders see it."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import torch
from espnet2.lm.abs_model import AbsLM

from espnet_mpq.hosts.espnet.lm.packed import PackedHostLm
from espnet_mpq.hosts.espnet.lm.states import as_batch_of_one, split_states, stack_states
from espnet_mpq.runtime.rnn_lm import PackedRnn, State


class MpqPackedRNNLM(PackedHostLm, AbsLM):
    """Scores with codes and scales; same calls and state shapes as the host's SequentialRNNLM.

    Args:
        plan: the JSON form of the plan, as `mpq pack` wrote it to lm_conf.
        unit, nhid, nlayers, rnn_type, tie_weights: as in the host.

    Raises:
        PlanError, InputError: the plan or the sizes cannot be.
    """

    RUNTIME = PackedRnn
    packed: PackedRnn

    def __init__(
        self,
        vocab_size: int,
        plan: dict,
        unit: int = 650,
        nhid: Optional[int] = None,
        nlayers: int = 2,
        rnn_type: str = "lstm",
        tie_weights: bool = False,
    ):
        super().__init__()
        conf = {"unit": unit, "nhid": nhid, "nlayers": nlayers}
        conf.update(rnn_type=rnn_type, tie_weights=tie_weights)
        self.build("mpq_packed_rnn", conf, vocab_size, plan)
        # The host's searches read these (asr_transducer asserts that rnn_type exists).
        self.rnn_type = rnn_type.upper()
        self.nhid = self.architecture.nhid
        self.nlayers = nlayers

    def zero_state(self) -> State:
        """The start state of one hypothesis: (h, c), or h, each (nlayers, nhid)."""
        state = self.packed.zero_state(1)
        return tuple(x[:, 0] for x in state) if isinstance(state, tuple) else state[:, 0]

    def forward(self, input: torch.Tensor, hidden: Optional[State]) -> Tuple[torch.Tensor, State]:
        """Logits (B, T, V) and the state after token ids (B, T); state (nlayers, B, nhid)."""
        return self.packed.logits(input, hidden)

    def score(self, y: torch.Tensor, state: Optional[State], x: Any) -> Tuple[torch.Tensor, State]:
        """Log-probabilities (V,) of the next token after prefix ``y`` (1-D).

        ``state`` is None, what score returned, or one state of batch_score or zero_state.
        """
        log_probs, state = self.packed.step(y[-1:], as_batch_of_one(state))
        return log_probs.view(-1), state

    def batch_score(
        self, ys: torch.Tensor, states: List[Optional[State]], xs: Any
    ) -> Tuple[torch.Tensor, List[State]]:
        """Log-probabilities (B, V) after prefixes ``ys`` (B, length), one state a hypothesis.

        ``states`` may hold None (a hypothesis at its start) and states of score, batch_score or
        zero_state in any mixture; the returned ones are (nlayers, nhid) each, as the host's, and
        know the batch they belong to.
        """
        state = stack_states(states, self.zero_state)
        log_probs, state = self.packed.step(ys[:, -1], state)
        return log_probs, split_states(state)
