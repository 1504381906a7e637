"""The fused LSTM LM on packed codes: one call of the library for a step or a whole sequence."""

from __future__ import annotations

import ctypes
import weakref
from typing import Optional, Sequence, Tuple

import torch

from espnet_mpq.errors import InputError
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.matrix import KernelMatrix

HiddenState = Tuple[torch.Tensor, torch.Tensor]


class KernelLstm:
    """An LSTM LM of matrices of codes or floats in any mixture.

    Args:
        embedding: (vocab_size, unit); rows are looked up in its layout.
        matrices: per layer those of the input for the gates i, f, g, o, then those of the hidden
            state; last the output matrix, which may be the embedding.
        biases: float32, per layer one for each gate (nhid,), last the output's (vocab_size,).

    Raises:
        InputError: shapes that do not belong together.
    """

    def __init__(
        self,
        embedding: KernelMatrix,
        matrices: Sequence[KernelMatrix],
        biases: Sequence[torch.Tensor],
    ):
        self.nlayers = len(matrices) // 8
        self.nhid, self.vocab_size = matrices[0].rows, matrices[-1].rows
        library = embedding.library
        # Kept alive as long as the library points into them.
        self.matrices = [embedding, *matrices]
        biases = [bias.to(torch.float32).contiguous() for bias in biases]
        wanted = [(self.nhid,)] * (4 * self.nlayers) + [(self.vocab_size,)]
        handle = None
        if (
            len(matrices) == 8 * self.nlayers + 1
            and [tuple(bias.shape) for bias in biases] == wanted
        ):
            handle = library.mpq_lstm_lm_new(
                *(self.nlayers, embedding.cols, self.nhid, self.vocab_size),
                _pointers([matrix.handle for matrix in self.matrices]),
                _pointers([bias.data_ptr() for bias in biases]),
            )
        if not handle:
            raise InputError(
                "the kernels cannot take this LSTM",
                found=f"{len(matrices)} matrices, {len(biases)} biases, embedding "
                f"{embedding.rows} x {embedding.cols}",
            )
        self.library, self.handle = library, handle
        weakref.finalize(self, library.mpq_lstm_lm_free, handle).atexit = False

    def __reduce__(self):
        raise TypeError("a KernelLstm cannot be copied: its memory has one owner")

    @property
    def n_bytes(self) -> int:
        """Bytes of the repacked matrices; one that is embedding and output counts once."""
        return sum(matrix.n_bytes for matrix in set(self.matrices))

    def run(
        self,
        tokens: torch.Tensor,
        state: Optional[HiddenState],
        log_probs: bool,
        path: str,
        n_threads: Optional[int] = None,
    ) -> Tuple[torch.Tensor, HiddenState]:
        """Logits or log-probabilities after every token.

        Args:
            tokens: int64 (batch, length) or, one a hypothesis, (batch,); CPU.
            state: (h, c), each float32 (nlayers, batch, nhid); None for zeros.
            path: one of dispatch.PATHS.
            n_threads: threads at most, the caller's included; None: torch.get_num_threads().
                The result is the same for every number.

        Returns:
            float32 (*tokens.shape, vocab_size) and the new state.

        Raises:
            InputError: wrong shapes, dtypes or device, or a token outside the vocabulary.
        """
        # A step of a small LM takes some 40 us, and a call of torch about one.
        dispatch.check_cpu(tokens)
        if tokens.dtype is not torch.int64 or not tokens.is_contiguous():
            tokens = tokens.to(torch.int64).contiguous()
        batch, length = tokens.shape if tokens.dim() == 2 else (tokens.shape[0], 1)
        shape = (self.nlayers, batch, self.nhid)
        h = c = None
        if state is not None:
            h, c = _state(state[0], shape), _state(state[1], shape)
        new_h, new_c = torch.empty(shape), torch.empty(shape)
        out = torch.empty((*tokens.shape, self.vocab_size))
        code = self.library.mpq_lstm_lm_run(
            self.handle,
            tokens.data_ptr(),
            batch,
            length,
            dispatch.address(h),
            dispatch.address(c),
            new_h.data_ptr(),
            new_c.data_ptr(),
            out.data_ptr(),
            log_probs,
            dispatch.NUMBERS[path],
            n_threads or torch.get_num_threads(),
        )
        dispatch.check(code, "LSTM")
        return out, (new_h, new_c)


def _pointers(addresses: Sequence[int]):
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _state(x: torch.Tensor, shape: tuple) -> torch.Tensor:
    if x.dtype is not torch.float32 or x.shape != shape or not x.is_cpu:
        raise InputError(
            "LSTM state",
            found=f"{x.dtype} {tuple(x.shape)} on {x.device}",
            expected=f"torch.float32 {shape} on the CPU",
        )
    return x.contiguous()
