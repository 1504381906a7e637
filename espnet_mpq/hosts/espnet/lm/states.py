"""States of hypotheses as the host's searches hold them: one each, taken from a stacked batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, List, Optional, Tuple

import numpy
import torch

from espnet_mpq.runtime.rnn_lm import State


class HypothesisState(Sequence):
    """(h, c) of one hypothesis, each (nlayers, nhid): a column of the batch that it came from.

    The host carries one state a hypothesis. Slicing every column out of a batch and stacking the
    chosen ones again costs more than a small LM's step, so a state only says where its column
    is, and states of one batch are gathered together. Copies and pickles are plain pairs.

    Args:
        batch: (h, c), each (nlayers, B, nhid); kept whole, and never written to, as long as one
            of its states lives.
        index: the column.
    """

    __slots__ = ("batch", "index")

    def __init__(self, batch: Tuple[torch.Tensor, torch.Tensor], index: int):
        self.batch, self.index = batch, index

    def __len__(self) -> int:
        return 2

    def __getitem__(self, k):
        if isinstance(k, slice):
            return tuple(self)[k]
        return self.batch[k][:, self.index]

    def __reduce__(self):
        return tuple, (tuple(tensor.clone() for tensor in self),)

    def __repr__(self) -> str:
        return f"HypothesisState({tuple(self)})"


def split_states(state: State) -> List:
    """A stacked state as one state a hypothesis; a GRU's or plain RNN's are bare tensors."""
    if isinstance(state, tuple):
        return [HypothesisState(state, i) for i in range(state[0].size(1))]
    return list(state.unbind(1))


def stack_states(states: Sequence, zero_state: Callable[[], State]) -> Optional[State]:
    """The stacked state of a batch, or None when every hypothesis is at its start.

    Args:
        states: one a hypothesis: None, a HypothesisState, or tensors (nlayers, nhid) or
            (nlayers, 1, nhid); a pair of them for an LSTM.
        zero_state: gives the start state of one hypothesis.
    """
    first = states[0]
    if type(first) is HypothesisState:
        batch = first.batch
        index = [s.index for s in states if type(s) is HypothesisState and s.batch is batch]
        if len(index) == len(states):  # nearly always: what survived of the step before
            if batch[0].size(1) == 1 == len(index):
                return batch
            # Three times as fast as torch.tensor(index).
            chosen = torch.from_numpy(numpy.array(index)).to(batch[0].device)
            return tuple(tensor.index_select(1, chosen) for tensor in batch)
    elif all(state is None for state in states):
        return None
    start = zero_state()
    states = [start if state is None else state for state in states]
    if isinstance(start, tuple):
        return tuple(torch.stack([_column(s[k]) for s in states], dim=1) for k in range(2))
    return torch.stack([_column(state) for state in states], dim=1)


def as_batch_of_one(state: Optional[State]) -> Optional[State]:
    """One hypothesis' state, in any of the forms stack_states takes, as (nlayers, 1, nhid)."""
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else _column(state).unsqueeze(1).contiguous()
    # Contiguous: cuDNN takes no other.
    return tuple(_column(tensor).unsqueeze(1).contiguous() for tensor in state)


def _column(tensor: torch.Tensor) -> torch.Tensor:
    """(nlayers, 1, nhid) or (nlayers, nhid) -> (nlayers, nhid)."""
    return tensor[:, 0] if tensor.dim() == 3 else tensor
