"""What every runtime of a packed model is made of: the tensors of the file, and no more."""

from __future__ import annotations

from typing import Dict, Optional, Sequence

import torch

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError
from espnet_mpq.kernels import dispatch
from espnet_mpq.kernels.matrix import KernelMatrix
from espnet_mpq.packed.dequantize import dequantize
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.load import check_model
from espnet_mpq.packed.tensors import tensor_specs
from espnet_mpq.plan import Plan
from espnet_mpq.runtime.holder import PackedTensors
from espnet_mpq.runtime.kernel_forms import kernel_name, path_for


class PackedModule(PackedTensors):
    """Holds the tensors of a whole packed file; subclasses compute from them.

    Args:
        architecture: the shape of the model.
        plan: bits, grid and scale tying per cluster.

    Raises:
        PlanError: the plan does not fit the architecture.
    """

    MADE = ("_dense",)

    def __init__(self, architecture: Architecture, plan: Plan):
        super().__init__(tensor_specs(architecture, plan))
        self.architecture = architecture
        self.plan = plan

    def load(self, packed: PackedModel) -> None:
        """Take the tensors of a packed LM; raises MismatchError for another one."""
        check_model(packed, self.architecture, self.plan, "packed LM")
        self.fill(packed.tensors, self.device)

    def matrix(self, cluster: Cluster, parts: Sequence[Part]) -> KernelMatrix:
        """The kernel form of parts of one cluster, their rows stacked.

        From now on it holds them in place of their buffers.

        Raises:
            InputError: no kernels, or they cannot take it.
        """
        return self.kernel_form(cluster, parts, self.plan.clusters[cluster.name])

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

    def extra_repr(self) -> str:
        n_bytes = sum(spec.n_bytes for spec in tensor_specs(self.architecture, self.plan))
        return f"{self.architecture.describe()}, {n_bytes} bytes"
