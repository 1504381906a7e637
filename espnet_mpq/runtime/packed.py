"""What every runtime of a packed model is made of: the tensors of the file, and no more."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy
import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.packed.dequantize import dequantize
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.load import check_model
from espnet_mpq.packed.tensors import DTYPES, tensor_specs
from espnet_mpq.plan import Plan
from espnet_mpq.runtime.kernel_forms import (
    from_kernel,
    kernel_name,
    make_matrix,
    path_for,
    stored_name,
)


class _Held(NamedTuple):
    """Where a tensor of the file is: rows start to stop of a kernel form."""

    matrix: KernelMatrix
    start: int
    stop: int
    bits: int  # of the file

    def tensor(self) -> torch.Tensor:
        stored = self.matrix.stored()[self.start : self.stop]
        return from_kernel(stored, self.bits, self.matrix.cols).clone()


class PackedModule(torch.nn.Module):
    """Holds the tensors of a packed file; subclasses compute from them.

    Buffers hold exactly the tensors of the packed file; there are no parameters. Memory holds
    codes and 16- and 32-bit weights once: a part whose kernel form was asked for (matrix) has no
    buffer until the module moves or is cast; `tensor`, copies and state dicts make it anew.
    What a subclass makes from all that (float weights, kernel forms) it keeps in the attributes
    that MADE names: they are None until the first call and after every load, move and cast.
    Inference only: the module stays in eval mode and gives no gradients.

    Args:
        architecture: the shape of the model.
        plan: bits, grid and scale tying per cluster.

    Raises:
        PlanError: the plan does not fit the architecture.
    """

    MADE = ("_dense",)

    def __init__(self, architecture: Architecture, plan: Plan):
        super().__init__()
        self.architecture = architecture
        self.plan = plan
        self.filled = False
        self._matrices: Dict[Tuple[str, ...], KernelMatrix] = {}
        self._held: Dict[str, _Held] = {}
        self._forget()
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
        self._matrices, self._held = {}, {}
        self._forget()
        self.filled = True

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the packed file by its name there; made anew where a kernel form has it."""
        tensor = self._buffers[_buffer_name(name)]
        return self._held[name].tensor() if tensor is None else tensor

    def matrix(self, cluster: Cluster, parts: Sequence[Part]) -> KernelMatrix:
        """The kernel form of parts of one cluster, their rows stacked.

        From now on it holds them in place of their buffers.

        Raises:
            InputError: no kernels, or they cannot take it.
        """
        spec = self.plan.clusters[cluster.name]
        names = tuple(stored_name(cluster, part, spec) for part in parts)
        if names not in self._matrices:
            # Of two threads the first one's is kept; in this order `tensor` finds every tensor.
            made = make_matrix(self.tensor, cluster, parts, spec)
            matrix, start = self._matrices.setdefault(names, made), 0
            for name, part in zip(names, parts):
                stop = start + part.shape[0]
                self._held[name] = _Held(matrix, start, stop, spec.bits)
                self._buffers[_buffer_name(name)] = None
                start = stop
        return self._matrices[names]

    @property
    def device(self) -> torch.device:
        return self._float().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation: that of the biases, float32 unless the module was cast."""
        return self._float().dtype

    def _float(self) -> torch.Tensor:
        """A tensor that moves and is cast with the module: the first that stays float."""
        return self.tensor(self.architecture.rest()[0][0])

    def kernel(self) -> str:
        """What computes: a path of kernels/dispatch.py, or "reference" with the reason."""
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return f"{dispatch.REFERENCE} ({self.dtype} on {self.device.type})"
        return kernel_name(self.architecture)

    def path(self) -> Optional[str]:
        """The kernels' path that computes; None: the reference."""
        return path_for(self.architecture, self.device, self.dtype)

    def weights(self) -> Dict[str, torch.Tensor]:
        """The float state of the model, made anew from the buffers."""
        return dequantize(self.tensor, self.architecture, self.plan, self.dtype, self.device)

    def _check_filled(self) -> None:
        if not self.filled:
            raise InputError(
                "the packed LM is empty",
                todo="give its packed.safetensors (--lm_file DIR/packed.safetensors) and run "
                "through `python -m espnet_mpq`",
            )

    def _forget(self) -> None:
        """Drop what was made; all tensors of the file are in buffers again."""
        self._buffers.update(self._restored())
        self._matrices, self._held = {}, {}
        for name in self.MADE:
            setattr(self, name, None)

    def _restored(self) -> Dict[str, torch.Tensor]:
        """The buffers that kernel forms took the place of, by their names as buffers."""
        return {_buffer_name(name): held.tensor() for name, held in self._held.items()}

    def train(self, mode: bool = True) -> "PackedModule":
        """Stays in eval mode: packed weights cannot be trained."""
        return super().train(False)

    def _apply(self, fn, *args, **kwargs):
        """Move and cast, but never cast codes; drops what was made from the old ones."""

        def keep_codes(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            if tensor.dtype == torch.uint8 and new.dtype != torch.uint8:
                return tensor.to(new.device)
            return new

        self._forget()
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
        """Copies and pickles carry the packed form only.

        What is made anew here goes as arrays: for a spawned process a tensor would go as the file
        descriptor of its memory, which is gone before the process starts.
        """
        state = {**self.__dict__, **dict.fromkeys(self.MADE), "_matrices": {}, "_held": {}}
        restored = {name: tensor.numpy() for name, tensor in self._restored().items()}
        return {**state, "_buffers": {**self._buffers, **restored}}

    def __setstate__(self, state):
        buffers = {
            name: torch.from_numpy(buffer) if isinstance(buffer, numpy.ndarray) else buffer
            for name, buffer in state["_buffers"].items()
        }
        super().__setstate__({**state, "_buffers": buffers})

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update((prefix + name, t) for name, t in self._restored().items())

    def extra_repr(self) -> str:
        n_bytes = sum(spec.n_bytes for spec in tensor_specs(self.architecture, self.plan))
        return f"{self.architecture.describe()}, {n_bytes} bytes"


def _buffer_name(tensor_name: str) -> str:
    """Buffers may not have dots in their names."""
    return tensor_name.replace(".", ":")
