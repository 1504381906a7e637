"""A packed recurrent LM that runs without any host: codes and scales in, log-probabilities out."""

from __future__ import annotations

from typing import Dict, Optional, Tuple, Union

import torch

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.lstm import KernelLstm
from espnet_mpq.kernels.reference import dequantize_linear
from espnet_mpq.lm.kernels import kernel_name, make_lstm, runnable
from espnet_mpq.packed.architecture import Architecture
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.layout import DTYPES, codes_name, scales_name, tensor_specs, weight_name
from espnet_mpq.packed.load import check_model
from espnet_mpq.plan import Plan
from espnet_mpq.quant.grid import make_grid

# (h, c) of an LSTM, h of a GRU or plain RNN; each (nlayers, batch, nhid)
State = Union[torch.Tensor, Tuple[torch.Tensor, torch.Tensor]]
RNN_CLASSES = {
    "lstm": (torch.nn.LSTM, {}),
    "gru": (torch.nn.GRU, {}),
    "rnn_tanh": (torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (torch.nn.RNN, {"nonlinearity": "relu"}),
}


class PackedRnn(torch.nn.Module):
    """Runtime of a packed LM with the layout of ESPnet's SequentialRNNLM.

    Buffers hold exactly the tensors of the packed file; there are no parameters. On the CPU in
    float32 an LSTM runs on the kernels (int8 activations; MPQ_KERNEL chooses the path); all else
    runs on the reference, float weights and float activations. Either form is made from the
    buffers at its first call and kept until the module moves or is cast.
    Inference only: the module stays in eval mode and gives no gradients.

    Args:
        architecture: sizes and RNN type.
        plan: bits, grid and scale tying per cluster.

    Raises:
        PlanError: the plan does not fit the architecture.
    """

    def __init__(self, architecture: Architecture, plan: Plan):
        super().__init__()
        self.architecture = architecture
        self.plan = plan
        self.filled = False
        self._dense: Optional[tuple] = None
        self._lstm: Optional[KernelLstm] = None
        for spec in tensor_specs(architecture, plan):
            empty = torch.zeros(spec.shape, dtype=DTYPES[spec.dtype][0])
            self.register_buffer(_buffer_name(spec.name), empty)
        super().train(False)

    def load(self, packed: PackedModel) -> None:
        """Take the tensors of a packed LM; raises MismatchError for another one."""
        check_model(packed, self.architecture, self.plan, "packed LM")
        device = self.device
        for name, tensor in packed.tensors.items():
            self._buffers[_buffer_name(name)] = tensor.to(device)
        self._dense = self._lstm = None
        self.filled = True

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the packed file by its name there."""
        return self._buffers[_buffer_name(name)]

    @property
    def device(self) -> torch.device:
        return self.tensor("decoder.bias").device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation: that of the biases, float32 unless the module was cast."""
        return self.tensor("decoder.bias").dtype

    def zero_state(self, batch_size: int = 1) -> State:
        """The state before the first token: zeros (nlayers, batch_size, nhid)."""
        shape = (self.architecture.nlayers, batch_size, self.architecture.nhid)
        h = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return (h, torch.zeros_like(h)) if self.architecture.rnn_type == "lstm" else h

    @torch.no_grad()
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

    def kernel(self) -> str:
        """What computes: a path of kernels/dispatch.py, or "reference" with the reason."""
        if runnable(self.architecture, self.plan, self.device, self.dtype):
            return dispatch.choose()
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return f"{dispatch.REFERENCE} ({self.dtype} on {self.device.type})"
        return kernel_name(self.architecture, self.plan)

    def _run(self, tokens, state, log_probs: bool) -> Tuple[torch.Tensor, State]:
        self._check_filled()
        path = runnable(self.architecture, self.plan, self.device, self.dtype)
        if path is not None:
            if self._lstm is None:
                self._lstm = make_lstm(self.architecture, self.plan, self.tensor)
            return self._lstm.run(tokens, state, log_probs, path)
        embedding, rnn, output, bias = self._dense_weights()
        hidden, state = rnn(torch.nn.functional.embedding(tokens, embedding), state)
        logits = torch.nn.functional.linear(hidden, output, bias)
        return logits.log_softmax(dim=-1) if log_probs else logits, state

    @torch.no_grad()
    def step(
        self, tokens: torch.Tensor, state: Optional[State] = None
    ) -> Tuple[torch.Tensor, State]:
        """Log-probabilities of the next token after one more: int64 (batch,) -> (batch, V)."""
        log_probs, state = self._run(tokens.reshape(-1, 1), state, True)
        return log_probs.squeeze(1), state

    def forward(self, tokens: torch.Tensor, state: Optional[State] = None):
        """As logits."""
        return self.logits(tokens, state)

    def weights(self) -> Dict[str, torch.Tensor]:
        """Every parameter of the LM as a float matrix or vector, made anew from the buffers."""
        shapes = self.architecture.parameter_shapes()
        values = {
            name: torch.empty(shape, dtype=self.dtype, device=self.device)
            for name, shape in shapes.items()
        }
        for cluster in self.architecture.clusters():
            spec = self.plan.clusters[cluster.name]
            for part in cluster.parts:
                if spec.bits >= 16:
                    piece = self.tensor(weight_name(cluster, part))
                else:
                    piece = dequantize_linear(
                        self.tensor(codes_name(cluster, part)),
                        self.tensor(scales_name(cluster, part, spec)),
                        make_grid(spec.grid, spec.bits).levels_tensor(self.device, torch.float32),
                        spec.bits,
                        part.cols,
                        spec.group_size,
                    )
                values[part.parameter][part.start : part.stop] = piece
        for name, _ in self.architecture.rest():
            values[name].copy_(self.tensor(name))
        return values

    def _check_filled(self) -> None:
        if not self.filled:
            raise InputError(
                "the packed LM is empty",
                todo="give its packed.safetensors (--lm_file DIR/packed.safetensors) and run "
                "through `python -m espnet_mpq`",
            )

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

    def train(self, mode: bool = True) -> "PackedRnn":
        """Stays in eval mode: packed weights cannot be trained."""
        return super().train(False)

    def _apply(self, fn, *args, **kwargs):
        """Move and cast, but never cast codes; drops what was made from the old ones."""

        def keep_codes(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            if tensor.dtype == torch.uint8 and new.dtype != torch.uint8:
                return tensor.to(new.device)
            return new

        self._dense = self._lstm = None
        return super()._apply(keep_codes, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        raise MismatchError(
            "a packed LM takes its weights from its packed file alone",
            found=f"a state dict with {len(state_dict)} entries",
            expected="packed.safetensors",
            todo="give packed.safetensors as --lm_file, or the config.yaml of the float LM with "
            "this checkpoint",
        )

    def __getstate__(self):
        """Copies and pickles carry the packed form only."""
        return {**self.__dict__, "_dense": None, "_lstm": None}

    def extra_repr(self) -> str:
        a = self.architecture
        n_bytes = sum(t.numel() * t.element_size() for t in self._buffers.values())
        return f"{a.rnn_type}, {a.nlayers} x {a.nhid}, {a.vocab_size} tokens, {n_bytes} bytes"


def _buffer_name(tensor_name: str) -> str:
    """Buffers may not have dots in their names."""
    return tensor_name.replace(".", ":")
