"""A packed recurrent LM that runs without any host: codes and scales in, log-probabilities out."""

from __future__ import annotations

import os
from typing import Dict, Optional, Tuple, Union

import torch

from espnet_mpq.architecture.rnn_lm import RnnArchitecture
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.lstm import KernelLstm
from espnet_mpq.runtime.kernel_forms import make_lstm
from espnet_mpq.runtime.packed import PackedModule

# (h, c) of an LSTM, h of a GRU or plain RNN; each (nlayers, batch, nhid)
State = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
RNN_CLASSES = {
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
    "rnn_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}


class PackedRnn(PackedModule):
    """Runtime of a packed LM with the layout of ESPnet's SequentialRNNLM.

    On the CPU in float32 an LSTM runs on the kernels (int8 activations; MPQ_KERNEL chooses the
    path); all else runs on the reference, float weights and float activations. Either form is
    made from the buffers at its first call and kept until the module moves or is cast.
    Arguments and errors as PackedModule.
    """

    MADE = ("_dense", "_lstm", "_chosen")
    architecture: RnnArchitecture
    _dense: Optional[tuple]
    _lstm: Optional[KernelLstm]
    _chosen: Optional[Dict[Optional[str], Optional[str]]]  # $MPQ_KERNEL -> path, None: reference

    def zero_state(self, batch_size: int = 1) -> State:
        """The state before the first token: zeros (nlayers, batch_size, nhid)."""
        shape = (self.architecture.nlayers, batch_size, self.architecture.nhid)
        h = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return (h, torch.zeros_like(h)) if self.architecture.rnn_type == "lstm" else h

    def logits(
        self, tokens: torch.Tensor, state: Optional[State] = None
    ) -> Tuple[torch.Tensor, State]:
        """Scores before the softmax for every position.

        Args:
            tokens: int64 (batch, length).
            state: the state before the first of them, None for zeros.

        Returns:
            (batch, length, vocab_size) and the state after the last token.
        """
        return self._run(tokens, state, False)

    def _run(self, tokens, state, log_probs: bool) -> Tuple[torch.Tensor, State]:
        """As logits, or log-probabilities; tokens (batch, length) or (batch,)."""
        self._check_filled()
        path = self._path()
        if path is not None:
            return self._lstm.run(tokens, state, log_probs, path)
        return self._run_reference(tokens, state, log_probs)

    def _path(self) -> Optional[str]:
        """The path that runs, None for the reference; makes the kernel form it needs."""
        asked = os.environ.get("MPQ_KERNEL")
        if self._lstm is None:
            path = self.path()
            if path is None:
                return None
            self._chosen = {asked: path}  # first, for other threads
            self._lstm = make_lstm(self.architecture, self.matrix, self.tensor)
            dispatch.trim()
        elif asked not in self._chosen:  # moves and casts drop the form, so it still fits
            path = dispatch.choose()
            self._chosen[asked] = None if path == dispatch.REFERENCE else path
        return self._chosen[asked]

    @torch.no_grad()
    def _run_reference(self, tokens, state, log_probs: bool) -> Tuple[torch.Tensor, State]:
        embedding, rnn, output, bias = self._dense_weights()
        vectors = torch.nn.functional.embedding(tokens.reshape(len(tokens), -1), embedding)
        hidden, state = rnn(vectors, state)
        logits = torch.nn.functional.linear(hidden, output, bias).view(*tokens.shape, -1)
        return logits.log_softmax(dim=-1) if log_probs else logits, state

    def step(
        self, tokens: torch.Tensor, state: Optional[State] = None
    ) -> Tuple[torch.Tensor, State]:
        """Log-probabilities of the next token after one more: int64 (batch,) -> (batch, V)."""
        return self._run(tokens, state, True)

    def forward(self, tokens: torch.Tensor, state: Optional[State] = None):
        """As logits."""
        return self.logits(tokens, state)

    @torch.no_grad()
    def _dense_weights(self):
        self._check_filled()
        # A replica on another device shares this attribute, so the device is part of the key.
        key = (self.device, self.dtype)
        if self._dense is None or self._dense[0] != key:
            values = self.weights()
            rnn = self._make_rnn(values)
            output = values.get("decoder.weight", values["encoder.weight"])
            self._dense = (key, (values["encoder.weight"], rnn, output, values["decoder.bias"]))
        return self._dense[1]

    def _make_rnn(self, values: Dict[str, torch.Tensor]) -> torch.nn.Module:
        a = self.architecture
        rnn_class, options = RNN_CLASSES[a.rnn_type]
        # Built on meta: no random numbers are drawn, so the host's seeds keep their meaning.
        rnn = rnn_class(a.unit, a.nhid, a.nlayers, batch_first=True, device="meta", **options)
        rnn = rnn.to(self.dtype).to_empty(device=self.device).eval()
        for name, parameter in rnn.named_parameters():
            parameter.copy_(values["rnn." + name])
            parameter.requires_grad_(False)
        rnn.flatten_parameters()
        return rnn
