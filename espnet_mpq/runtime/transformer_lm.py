"""A packed Transformer LM that runs without any host: codes in, log-probabilities out."""

from __future__ import annotations

from math import isnan, log, sqrt
from typing import Callable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F

from espnet_mpq.architecture.transformer_lm import TransformerArchitecture
from espnet_mpq.errors import InputError
from espnet_mpq.kernels import dispatch
from espnet_mpq.runtime.layers import DenseLayers, KernelLayers
from espnet_mpq.runtime.packed import PackedModule
from espnet_mpq.runtime.prefixes import (
    Memory,
    Prefix,
    ancestors,
    attend_to_ancestors,
    attend_to_sequence,
)

# Of the host: its own LayerNorm has 1e-12, the one behind the embedding is PyTorch's.
NORM_EPS, EMBED_NORM_EPS = 1e-12, 1e-5
Norm = Tuple[torch.Tensor, torch.Tensor]  # weight, bias
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PackedTransformer(PackedModule):
    """Runtime of a packed LM with the layout of ESPnet's TransformerLM.

    On the CPU in float32 the linear layers run on the kernels (int8 activations; MPQ_KERNEL
    chooses the path), elsewhere on the reference, float weights and float activations. A step
    computes the newest token alone: keys and values of earlier ones are in the state.
    Arguments and errors as PackedModule.
    """

    MADE = ("_dense", "_kernels")
    architecture: TransformerArchitecture
    _dense: Optional[tuple]
    _kernels: Optional["_Network"]

    def zero_state(self, batch_size: int = 1) -> List[Prefix]:
        """The state before the first token: an empty prefix for every hypothesis."""
        return [()] * batch_size

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, state: None = None) -> Tuple[torch.Tensor, None]:
        """Scores before the softmax for every position of whole sequences.

        Args:
            tokens: int64 (batch, length); token 0 is padding, which no other token sees.
            state: None, as in the host; step goes on from a state.

        Returns:
            (batch, length, vocab_size) and None.

        Raises:
            InputError: a state.
        """
        if state is not None:
            raise InputError(
                "a Transformer LM scores sequences from their start",
                found="a state",
                expected="None; use step to go on from a state",
            )
        heads = self.architecture.head

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_to_sequence(q, k, v, tokens, heads)

        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self._network().run(tokens, positions, attend), None

    @torch.no_grad()
    def step(
        self, tokens: torch.Tensor, state: Optional[Sequence[Prefix]] = None
    ) -> Tuple[torch.Tensor, List[Prefix]]:
        """Log-probabilities of the next token after one more.

        Args:
            tokens: int64 (batch,), the newest token of every hypothesis.
            state: their earlier tokens, one Prefix each, in any mixture of lengths; None: all
                are at their start.

        Returns:
            (batch, vocab_size) and the state with the newest tokens. Where activations overflow
            (16-bit floats), nan stays in the hypotheses that have it.
        """
        if not len(tokens):
            return self.tensor("decoder.bias").new_empty(0, self.architecture.vocab_size), []
        prefixes = self.zero_state(len(tokens)) if state is None else state
        visible = [token != 0 for token in tokens.tolist()]
        like, heads = self.tensor("encoder.after_norm.bias"), self.architecture.head
        memory = Memory(prefixes, visible, self.architecture.layer, like)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return memory.attend(q, k, v, layer, heads)

        positions = torch.tensor([len(prefix) for prefix in prefixes], device=tokens.device)
        log_probs = self._network().run(tokens, positions, attend).log_softmax(dim=-1)
        if len(tokens) > 1 and any(map(isnan, log_probs[:, 0].tolist())):
            # Attention gives the tokens of other hypotheses no weight, but 0 x nan is nan.
            steps = [self.step(t[None], [p]) for t, p in zip(tokens, prefixes)]
            return torch.cat([scores for scores, _ in steps]), [grown for _, (grown,) in steps]
        return log_probs, memory.extended()

    @torch.no_grad()
    def tree_logits(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Scores before the softmax of what follows every prefix of a tree, in one pass.

        Args:
            tokens: int64 (n,), the last token of every prefix; token 0 is seen by no other.
            parents: int64 (n,), where the prefix without its last token stands, -1 for none;
                parents come before their children.

        Returns:
            (n, vocab_size).
        """
        seen, positions = ancestors(parents)
        hidden = ~seen | (tokens == 0)
        heads = self.architecture.head

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_to_ancestors(q, k, v, hidden, heads)

        return self._network().run(tokens, positions, attend)

    def forward(self, tokens: torch.Tensor, state: None = None):
        """As logits."""
        return self.logits(tokens, state)

    def _network(self) -> "_Network":
        self._check_filled()
        if self.path():
            if self._kernels is None:
                self._kernels = _Network(self, KernelLayers(self))
                dispatch.trim()
            return self._kernels
        # A replica on another device shares this attribute, so the device is part of the key.
        key = (self.device, self.dtype)
        if self._dense is None or self._dense[0] != key:
            self._dense = key, _Network(self, DenseLayers(self.weights()))
        return self._dense[1]


class _Network:
    """The layers of a Transformer LM over given linear layers; attention is the caller's.

    Args:
        lm: gives sizes and norms.
        layers: makes the linear layers.
    """

    def __init__(self, lm: PackedTransformer, layers: Union[DenseLayers, KernelLayers]):
        a, linear = lm.architecture, layers.linear

        def norm(name: str) -> Norm:
            return lm.tensor(f"{name}.weight"), lm.tensor(f"{name}.bias")

        self.width, self.has_positions = a.att_unit, a.pos_enc is not None
        self.rows, self.embed = layers.rows("embed"), linear("encoder.embed.0")
        self.embed_norm, self.after_norm = norm("encoder.embed.1"), norm("encoder.after_norm")
        self.blocks = []
        for block in range(a.layer):
            prefix = f"encoder.encoders.{block}"
            attention = f"{prefix}.self_attn.linear_"
            self.blocks.append(
                (
                    norm(f"{prefix}.norm1"),
                    linear(f"{attention}q", f"{attention}k", f"{attention}v"),
                    linear(f"{attention}out"),
                    norm(f"{prefix}.norm2"),
                    linear(f"{prefix}.feed_forward.w_1"),
                    linear(f"{prefix}.feed_forward.w_2"),
                )
            )
        self.output = linear("decoder")

    def run(self, tokens: torch.Tensor, positions: torch.Tensor, attend: Attention) -> torch.Tensor:
        """Logits (..., vocab_size) of token ids (...); positions broadcast to them.

        Args:
            attend: layer, query, key, value (..., att_unit) -> context (..., att_unit).
        """
        x = self._norm(self.embed(self.rows(tokens)), self.embed_norm, EMBED_NORM_EPS).relu_()
        if self.has_positions:
            x = x * sqrt(self.width) + sinusoids(positions, self.width).to(x.dtype)
        for layer, (norm1, qkv, out, norm2, w_1, w_2) in enumerate(self.blocks):
            x = x + out(attend(layer, *qkv(self._norm(x, norm1)).chunk(3, dim=-1)))
            x = x + w_2(w_1(self._norm(x, norm2)).relu_())
        return self.output(self._norm(x, self.after_norm))

    def _norm(self, x: torch.Tensor, norm: Norm, eps: float = NORM_EPS) -> torch.Tensor:
        return F.layer_norm(x, (self.width,), *norm, eps)


def sinusoids(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Sines in even and cosines in odd columns: int64 (n,) -> float32 (n, width).

    Source: Vaswani et al. 2017, section 3.5, with the host's rounding (PositionalEncoding).
    """
    evens = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions.to(torch.float32).unsqueeze(-1) * torch.exp(evens * -(log(10000.0) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
