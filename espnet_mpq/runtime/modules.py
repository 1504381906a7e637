"""Layers that compute from a packed file, and their swap into any module in place of its own."""

from __future__ import annotations

from typing import Callable, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F

from espnet_mpq.architecture.base import Architecture
from espnet_mpq.clusters import Cluster, Part
from espnet_mpq.errors import InputError
from espnet_mpq.kernels import dispatch
from espnet_mpq.packed.dequantize import dequantize_part
from espnet_mpq.packed.format import PackedModel
from espnet_mpq.packed.tensors import TensorSpec, cluster_tensors
from espnet_mpq.plan import ClusterSpec, Plan
from espnet_mpq.runtime.holder import PackedTensors

# Numbers that an unfolded piece of a convolution's input has at most.
PIECE_SIZE = 1 << 22


class PackedLayer(PackedTensors):
    """One layer with one weight matrix in packed form, in place of a layer with floats.

    On the CPU in float32 it computes on the kernels, with int8 activations where the weights are
    codes; elsewhere, and with MPQ_KERNEL=reference, with float weights and float activations:
    the reference.

    Args:
        layer: the one to replace; its sizes are taken over, its weights are not.
        path: its name in the model.
        cluster: of its weight, which must be ``cluster``'s ``part`` from first to last row.
        spec, scale_dtype: how the plan stores the cluster.

    Attributes:
        names: tensors of the file that it holds.
    """

    MADE = ("_weight",)
    _weight: Optional[torch.Tensor]

    def __init__(
        self,
        layer: torch.nn.Module,
        path: str,
        cluster: Cluster,
        part: Part,
        spec: ClusterSpec,
        scale_dtype: str,
    ):
        alone = Cluster(cluster.name, cluster.kind, (part,))
        specs = cluster_tensors(alone, spec, scale_dtype)
        bias, bias_name = getattr(layer, "bias", None), None
        if bias is not None:
            bias_name = f"{path}.bias" if path else "bias"
            specs.append(TensorSpec(bias_name, "F32", tuple(bias.shape), "rest"))
        super().__init__(specs)
        self.names = tuple(tensor.name for tensor in specs)
        self._bias_name, self._cluster, self._part, self._spec = bias_name, alone, part, spec
        self._shape = tuple(layer.weight.shape)
        # Says device and dtype of computation; scales are float16 in a file.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take its tensors out of those of the file."""
        self.fill({name: tensors[name] for name in self.names}, self._like.device)

    @property
    def weight(self) -> torch.Tensor:
        """The float weight in the shape of the layer that was replaced."""
        if not self.filled:
            raise InputError(
                "the packed model is empty",
                todo="give its packed.safetensors and run through `python -m espnet_mpq`",
            )
        like = self._like
        kept = self._weight
        # A replica on another device shares this attribute.
        if kept is None or kept.device != like.device or kept.dtype != like.dtype:
            values = dequantize_part(self.tensor, self._cluster, self._part, self._spec)
            kept = self._weight = values.to(like).view(self._shape)
        return kept

    @property
    def bias(self) -> Optional[torch.Tensor]:
        return None if self._bias_name is None else self.tensor(self._bias_name)

    def path(self) -> Optional[str]:
        """The kernels' path that computes; None: the reference."""
        path, like = dispatch.choose(), self._like
        if path == dispatch.REFERENCE or like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        return path if self.filled and self._part.cols <= dispatch.max_cols() else None

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias on the kernels: float32 (N, cols) -> (N, rows)."""
        matrix = self.kernel_form(self._cluster, [self._part], self._spec)
        return matrix.linear(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self._cluster.name}, {self._spec.bits} bits, {self._shape}"


class PackedLinear(PackedLayer):
    """In place of torch.nn.Linear: (..., in) -> (..., out)."""

    def __init__(self, layer: torch.nn.Linear, *args):
        super().__init__(layer, *args)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.path() is None:
            return F.linear(x, self.weight, self.bias)
        y = self._product(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)


class PackedEmbedding(PackedLayer):
    """In place of torch.nn.Embedding: ids (...) -> rows (..., dim)."""

    def __init__(self, layer: torch.nn.Embedding, *args):
        super().__init__(layer, *args)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        if layer.max_norm is not None:
            raise InputError(f"{args[0]} is an embedding with max_norm", found=layer.max_norm)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.path() is None:
            return F.embedding(ids, self.weight)
        return self.kernel_form(self._cluster, [self._part], self._spec).embedding(ids)


class _PackedConvolution(PackedLayer):
    """What convolutions share: input windows as rows, one product for all of them."""

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation, self.groups = layer.padding, layer.dilation, layer.groups
        self.padding_mode = layer.padding_mode
        # Groups, padding by a word ("same") and other fills than zeros stay with the reference.
        self._has_windows = layer.groups == 1 and not isinstance(layer.padding, str)
        self._has_windows = self._has_windows and layer.padding_mode == "zeros"
        self._pad = getattr(layer, "_reversed_padding_repeated_twice", None)

    def _reference(self, convolution: Callable, x: torch.Tensor) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad, mode=self.padding_mode), 0
        return convolution(
            *(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        )

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) on the kernels -> (B, out, L), L windows in row-major order."""
        options = (self._two(self.kernel_size, 1), self._two(self.dilation, 1))
        options += (self._two(self.padding, 0), self._two(self.stride, 1))
        n_rows = max(1, PIECE_SIZE // self._part.cols)
        outputs = []
        for one in x:  # a batch of windows at once would need many times its memory
            rows = F.unfold(one[None], *options)[0].t()
            pieces = [self._product(piece.contiguous()) for piece in rows.split(n_rows)]
            outputs.append(torch.cat(pieces).t())
        return torch.stack(outputs)

    @staticmethod
    def _two(value: Tuple[int, ...], front: int) -> Tuple[int, int]:
        return (front, *value) if len(value) == 1 else tuple(value)

    def _n_out(self, axis: int, n_in: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (n_in + 2 * self.padding[axis] - reach) // self.stride[axis] + 1


class PackedConv1d(_PackedConvolution):
    """In place of torch.nn.Conv1d: (B, in, T) -> (B, out, T')."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.path() is None or not self._has_windows:
            return self._reference(F.conv1d, x)
        if self.kernel_size == (1,) and self.stride == (1,) and self.padding == (0,):
            rows = x.transpose(1, 2)
            y = self._product(rows.reshape(-1, self.in_channels))
            # As torch gives it: a host may call view on it.
            return y.view(*rows.shape[:2], self.out_channels).transpose(1, 2).contiguous()
        return self._windows(x[:, :, None])


class PackedConv2d(_PackedConvolution):
    """In place of torch.nn.Conv2d: (B, in, H, W) -> (B, out, H', W')."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.path() is None or not self._has_windows:
            return self._reference(F.conv2d, x)
        shape = [self._n_out(axis, n) for axis, n in enumerate(x.shape[2:])]
        return self._windows(x).view(len(x), self.out_channels, *shape)


# Class of a layer -> the packed one in its place. Of other classes, subclasses included, the
# dequantized weights are kept: they compute as they did.
PACKED_LAYERS = {
    torch.nn.Linear: PackedLinear,
    torch.nn.Embedding: PackedEmbedding,
    torch.nn.Conv1d: PackedConv1d,
    torch.nn.Conv2d: PackedConv2d,
}


class PackedLayers:
    """The packed layers of a module, swapped in place of its own; fills them and all the rest.

    Args:
        module: whose layers are replaced; no weight of it is used.
        architecture: of the module as it is now.
        plan: bits, grid and scale tying per cluster.

    Raises:
        PlanError: the plan does not fit the architecture.
    """

    def __init__(self, module: torch.nn.Module, architecture: Architecture, plan: Plan):
        clusters = architecture.clusters()
        plan.check(clusters)
        self.layers: Dict[str, PackedLayer] = {}
        places = _places(module)
        shared = set(architecture.ties().values())
        for cluster in clusters:
            for part in cluster.parts:
                path = part.parameter[: -len(".weight")]
                layer = places.get(path)
                made = PACKED_LAYERS.get(type(layer))
                # A part of a matrix, or one that two layers share, stays what it is.
                is_whole = layer is not None and part.stop - part.start == len(layer.weight)
                if made is None or not is_whole or part.parameter in shared:
                    continue
                spec = plan.clusters[cluster.name]
                packed = made(layer, path, cluster, part, spec, plan.scale_dtype)
                _put(module, path, packed)
                self.layers[path] = packed
        for parameter in module.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def fill(self, module: torch.nn.Module, packed: PackedModel) -> None:
        """Give the layers their tensors, and what stays float in ``module`` its values.

        Args:
            module: as given when the layers were made.
            packed: of this architecture and plan.
        """
        for layer in self.layers.values():
            layer.load(packed.tensors)
        own = {name for layer in self.layers.values() for name in layer.names}
        floats = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, _ in packed.architecture.rest():
            if name not in own:
                floats[name].copy_(packed.tensors[name])
        for cluster in packed.architecture.clusters():
            spec = packed.plan.clusters[cluster.name]
            for part in cluster.parts:
                if part.parameter in floats:  # a layer without a packed class
                    values = dequantize_part(packed.tensors.__getitem__, cluster, part, spec)
                    whole = floats[part.parameter]
                    whole.view(len(whole), -1)[part.start : part.stop].copy_(values)


def _places(module: torch.nn.Module) -> Dict[str, torch.nn.Module]:
    """Layers by path, without those that stand at two places."""
    paths: Dict[torch.nn.Module, List[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        paths.setdefault(layer, []).append(path)
    return {places[0]: layer for layer, places in paths.items() if len(places) == 1}


def _put(module: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
