"""Tensors of a packed file, in memory once: as buffers, or inside the kernel forms of them."""

from __future__ import annotations

from typing import Dict, Mapping, NamedTuple, Sequence, Tuple

import numpy
import torch

from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import MismatchError
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.packed.tensors import DTYPES, TensorSpec
from espnet_mpq.plan import ClusterSpec
from espnet_mpq.runtime.kernel_forms import from_kernel, make_matrix, stored_name


class _Held(NamedTuple):
    """Where a tensor of the file is: rows start to stop of a kernel form."""

    matrix: KernelMatrix
    start: int
    stop: int
    bits: int  # of the file

    def tensor(self) -> torch.Tensor:
        stored = self.matrix.stored()[self.start : self.stop]
        return from_kernel(stored, self.bits, self.matrix.cols).clone()


class PackedTensors(torch.nn.Module):
    """Some or all tensors of a packed file; there are no parameters.

    Memory holds codes and 16- and 32-bit weights once: a part whose kernel form was asked for
    has no buffer until the module moves or is cast; `tensor`, copies and state dicts make it
    anew. What a subclass makes from all that (float weights, kernel forms) it keeps in the
    attributes that MADE names: they are None until the first call and after every load, move and
    cast. Inference only: the module stays in eval mode and gives no gradients.

    Args:
        specs: of the tensors; they are zero until `fill`.
    """

    MADE: Tuple[str, ...] = ()

    def __init__(self, specs: Sequence[TensorSpec]):
        super().__init__()
        self.filled = False
        self._matrices: Dict[Tuple[str, ...], KernelMatrix] = {}
        self._held: Dict[str, _Held] = {}
        self._forget()
        for spec in specs:
            empty = torch.zeros(spec.shape, dtype=DTYPES[spec.dtype][0])
            self.register_buffer(buffer_name(spec.name), empty)
        super().train(False)

    def fill(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Take tensors of the file, by their names there; all that were announced."""
        for name, tensor in tensors.items():
            self._buffers[buffer_name(name)] = tensor.to(device)
        self._matrices, self._held = {}, {}
        self._forget()
        self.filled = True

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the packed file by its name there; made anew where a kernel form has it."""
        tensor = self._buffers[buffer_name(name)]
        return self._held[name].tensor() if tensor is None else tensor

    def kernel_form(
        self, cluster: Cluster, parts: Sequence[Part], spec: ClusterSpec
    ) -> KernelMatrix:
        """The kernel form of parts of one cluster, their rows stacked.

        From now on it holds them in place of their buffers.

        Raises:
            InputError: no kernels, or they cannot take it.
        """
        names = tuple(stored_name(cluster, part, spec) for part in parts)
        if names not in self._matrices:
            # Of two threads the first one's is kept; in this order `tensor` finds every tensor.
            made = make_matrix(self.tensor, cluster, parts, spec)
            matrix, start = self._matrices.setdefault(names, made), 0
            for name, part in zip(names, parts):
                stop = start + part.shape[0]
                self._held[name] = _Held(matrix, start, stop, spec.bits)
                self._buffers[buffer_name(name)] = None
                start = stop
        return self._matrices[names]

    def _forget(self) -> None:
        """Drop what was made; all tensors of the file are in buffers again."""
        self._buffers.update(self._restored())
        self._matrices, self._held = {}, {}
        for name in self.MADE:
            setattr(self, name, None)

    def _restored(self) -> Dict[str, torch.Tensor]:
        """The buffers that kernel forms took the place of, by their names as buffers."""
        return {buffer_name(name): held.tensor() for name, held in self._held.items()}

    def train(self, mode: bool = True) -> "PackedTensors":
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
            "a packed model takes its weights from its packed file alone",
            found=f"a state dict with {len(state_dict)} entries",
            expected="packed.safetensors",
            todo="give packed.safetensors as --lm_file or --asr_model_file, or the config.yaml of "
            "the float model with this checkpoint",
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


def buffer_name(tensor_name: str) -> str:
    """Buffers may not have dots in their names."""
    return tensor_name.replace(".", ":")
