"""The weights of a model at every candidate bit-width: one of them, or their weighted sum."""

from __future__ import annotations

from typing import Dict, Tuple

import torch

from espnet_mpq.clusters import Cluster, ClusterWeights, Mats
from espnet_mpq.quant.fake_quant import project_cluster, straight_through
from espnet_mpq.quant.grid import make_grid
from espnet_mpq.quant.scale import SCALE_DTYPES, spread
from espnet_mpq.search.nas_options import NasOptions


class Candidates:
    """f_n(W) of every cluster for every candidate n, straight-through for W.

    Exact values are those of a packed file (optimal scales) and are kept until the weights
    change. While the weights train, the nearest levels at kept scales serve instead; renew
    those now and then with `refresh`.

    Args:
        weights: of the model, cluster by cluster.
        options: NasOptions (bits, grid, tying, group_size, scale_dtype).
    """

    def __init__(self, weights: ClusterWeights, options: NasOptions):
        self.weights = weights
        self.bits, self.specs = options.bits, options.specs()
        self._dtype = SCALE_DTYPES[options.scale_dtype]
        self._exact: Dict[Tuple[str, int], Tuple[tuple, Mats]] = {}
        self._stacks: Dict[str, Tuple[tuple, Mats]] = {}
        self._scales: Dict[Tuple[str, int], Mats] = {}

    def single(self, name: str, bits: int, exact: bool) -> Mats:
        """The weights of a cluster at ``bits``, the identity for gradients of the float ones."""
        values = self._values(name, bits, exact)
        weights = self._weights(name)
        if not torch.is_grad_enabled():
            return values
        return [straight_through(w, v) if w.requires_grad else v for w, v in zip(weights, values)]

    def mixed(self, name: str, p: torch.Tensor, exact: bool) -> Mats:
        """sum_n p_n f_n(W) for weights p (n_bits,) that sum to one; differentiable in p and W."""
        mats = []
        for weight, stack in zip(self._weights(name), self._stack(name, exact)):
            mat = torch.tensordot(p.to(stack), stack, dims=1)
            if weight.requires_grad:
                mat = mat + (weight - weight.detach())  # adds exact zeros, and the gradient
            mats.append(mat)
        return mats

    @torch.no_grad()
    def refresh(self) -> None:
        """Scales of all clusters and candidates, by least squares from the present weights."""
        for name in self.weights.clusters:
            for bits in self.bits:
                if bits < 16:
                    self._scales[name, bits] = self._fit(name, bits)

    def _weights(self, name: str) -> Mats:
        return self.weights.live(name)

    @property
    def clusters(self) -> Dict[str, Cluster]:
        return self.weights.clusters

    def _version(self, name: str) -> tuple:
        """Changes whenever the weights of the cluster do."""
        used = self.weights.parameters(name)
        return tuple((id(p), p.data_ptr(), p._version, p.dtype) for p in used)

    def _stack(self, name: str, exact: bool) -> Mats:
        """(n_bits, rows, cols) per part."""
        version = self._version(name)
        if exact and name in self._stacks and self._stacks[name][0] == version:
            return self._stacks[name][1]
        columns = zip(*(self._values(name, bits, exact) for bits in self.bits))
        stack = [torch.stack(column) for column in columns]
        if exact:
            self._stacks[name] = (version, stack)
            for bits in self.bits:  # the stack holds them too
                self._exact.pop((name, bits), None)
        return stack

    @torch.no_grad()
    def _values(self, name: str, bits: int, exact: bool) -> Mats:
        if bits < 16 and not exact:
            return self._nearest(name, bits)
        version = self._version(name)
        if name in self._stacks and self._stacks[name][0] == version:
            return [stack[self.bits.index(bits)] for stack in self._stacks[name][1]]
        kept = self._exact.get((name, bits))
        if kept is None or kept[0] != version:
            values = self._project(name, bits, "mse").values
            values = [v.to(w.dtype) for v, w in zip(values, self._weights(name))]
            kept = self._exact[name, bits] = (version, values)
        return kept[1]

    def _nearest(self, name: str, bits: int) -> Mats:
        """The nearest levels at the kept scales."""
        if (name, bits) not in self._scales:
            self._scales[name, bits] = self._fit(name, bits)
        spec = self.specs[bits]
        grid = make_grid(spec.grid, bits)
        values = []
        for weight, scale in zip(self._weights(name), self._scales[name, bits]):
            scale = spread(scale.to(weight.device), weight.shape[1], spec.group_size)
            divisor = torch.where(scale > 0, scale, torch.full_like(scale, float("inf")))
            value = grid.levels_of(grid.codes_of(weight.float() / divisor)).mul_(scale)
            values.append(value.to(weight.dtype))
        return values

    def _fit(self, name: str, bits: int) -> Mats:
        # From the weights alone, no warm start: a resumed run finds the same scales.
        return self._project(name, bits, "als").scales

    def _project(self, name: str, bits: int, method: str):
        mats = [weight.detach() for weight in self._weights(name)]
        return project_cluster(mats, self.specs[bits], method=method, scale_dtype=self._dtype)
