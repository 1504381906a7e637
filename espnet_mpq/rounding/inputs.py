"""What enters the matrices of a model: means and second moments, taken while a stage runs."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch

Names = Tuple[str, ...]
DAMPING = 0.03  # of the regression of float outputs on the inputs as they are
Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Input:
    """One tensor that enters matrices.

    Attributes:
        uses: parameters (rows, cols) that are multiplied with it. A use of several names are
            matrices side by side, each with its columns of the input (W and U of a recurrent
            layer); several uses read the same tensor (query, key, value).
        kind: "linear", "recurrent" or "embedding", where nothing is multiplied.
    """

    uses: Tuple[Names, ...]
    kind: str

    @property
    def names(self) -> Tuple[str, ...]:
        return tuple(name for use in self.uses for name in use)


class Moments:
    """Sums of an input x over positions, and of x - f, f the input in the float model; float64.

    Attributes:
        n: positions.
        total, fp_total: (C,) of x and of f.
        square, cross: (C, C) of x x' and of (f - x) x'.
    """

    def __init__(self):
        self.n, self.total, self.fp_total, self.square, self.cross = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, rows: torch.Tensor, fp_rows: Optional[torch.Tensor] = None) -> None:
        """``rows``, ``fp_rows``: float (positions, C) of x and f; None: they are the same."""
        rows = rows.detach().float()
        total = rows.sum(0, dtype=torch.float64)
        self.n, self.total = self.n + len(rows), self.total + total
        self.square = self.square + (rows.T @ rows).double()
        if fp_rows is None:
            self.fp_total = self.fp_total + total
            return
        fp_rows = fp_rows.detach().float()
        self.fp_total = self.fp_total + fp_rows.sum(0, dtype=torch.float64)
        self.cross = self.cross + ((fp_rows - rows).T @ rows).double()

    @property
    def mean(self) -> torch.Tensor:
        """(C,) float64, of x."""
        return self.total / self.n

    @property
    def fp_mean(self) -> torch.Tensor:
        """(C,) float64, of f."""
        return self.fp_total / self.n

    def covariance(self, centred: bool) -> torch.Tensor:
        """(C, C) float64: the mean of x x', around the mean of x or around 0."""
        square = self.square / self.n
        return square - torch.outer(self.mean, self.mean) if centred else square

    def correction(self, centred: bool) -> Optional[torch.Tensor]:
        """(C, C) float64 D: W (1 + D) x comes nearest to W f, by least squares; None where x = f.

        Source: own; a ridge regression with DAMPING of the mean variance of x.
        """
        if isinstance(self.cross, float):
            return None
        cross = self.cross / self.n
        if centred:
            cross = cross - torch.outer(self.fp_mean - self.mean, self.mean)
        covariance = self.covariance(centred)
        mean = float(covariance.diagonal().mean())
        if mean <= 0:
            return None
        covariance.diagonal().add_(DAMPING * mean)
        return torch.linalg.solve(covariance, cross.T).T


class Owners:
    """The modules that hold the parameters of a model; a tied parameter has several."""

    def __init__(self, model: torch.nn.Module):
        names = {id(p): name for name, p in model.named_parameters()}
        self.names: Dict[torch.nn.Module, Dict[str, str]] = {}
        for module in model.modules():
            own = {k: names[id(p)] for k, p in module.named_parameters(recurse=False)}
            if own:
                self.names[module] = own

    def modules(self, kind) -> List[torch.nn.Module]:
        return [module for module in self.names if isinstance(module, kind)]

    def bias_of(self, parameter: str) -> Optional[str]:
        """What is added to the products of ``parameter`` with its input, None without a bias."""
        for module in self.modules((torch.nn.Linear, torch.nn.RNNBase)):
            for local, name in self.names[module].items():
                if name == parameter:
                    return self.names[module].get(local.replace("weight", "bias"))
        return None

    def is_output_too(self, parameter: str) -> bool:
        """Whether a linear module holds this parameter."""
        linear = self.modules(torch.nn.Linear)
        return any(self.names[module].get("weight") == parameter for module in linear)


class Watch:
    """The inputs of one stage of a model.

    Args:
        layer: (x, inputs) -> y, the stage; reads its weights from the model when it is called.
        owners: of the model.
        recurrent: the parameters of a recurrent layer, where the stage is one: x, and its own
            output at the position before (0 at the first), enter it.
    """

    def __init__(self, layer: Layer, owners: Owners, recurrent: Sequence[str] = ()):
        self._layer, self._owners, self._own = layer, owners, set(recurrent)

    @torch.no_grad()
    def find(self, x: torch.Tensor, inputs: torch.Tensor) -> List[Input]:
        """The inputs in the order in which the stage uses them, found by running it once."""
        seen: List[Tuple[torch.Tensor, Input]] = []
        names = self._owners.names

        def linear(module, args):
            name = names[module]["weight"]
            if any(name in found.names for _, found in seen):
                return  # used twice: the first input counts
            last = seen[-1] if seen else None
            if last is not None and last[0] is args[0] and last[1].kind == "linear":
                seen[-1] = args[0], Input((*last[1].uses, (name,)), "linear")
            else:
                seen.append((args[0], Input(((name,),), "linear")))

        def embedding(module, args, output):
            seen.append((output, Input(((names[module]["weight"],),), "embedding")))

        with self._hooks(linear, embedding):
            self._layer(x, inputs)
        return [found for _, found in seen] + self._recurrent()

    def _recurrent(self) -> List[Input]:
        found = []
        for module in self._owners.modules(torch.nn.RNNBase):
            for local, name in self._owners.names[module].items():
                if local.startswith("weight_ih") and name in self._own:
                    other = self._owners.names[module][local.replace("_ih_", "_hh_")]
                    if module.mode == "GRU":  # r stands between U h and the rest: kept apart
                        found += [Input(((name,),), "recurrent"), Input(((other,),), "state")]
                    else:
                        found.append(Input(((name, other),), "recurrent"))
        return found

    @torch.no_grad()
    def rows(self, wanted: Input, x, inputs, mask: Optional[torch.Tensor]) -> torch.Tensor:
        """(N, C): an input of the stage at the positions that count, with the weights as they are.

        Args:
            mask: bool (B, T), the positions that count; None: all rows of x.
        """
        taken: List[torch.Tensor] = []

        def linear(module, args):
            if not taken and self._owners.names[module]["weight"] == wanted.names[0]:
                taken.append(args[0])

        with self._hooks(linear, None):
            y = self._layer(x, inputs)
        if wanted.kind in ("recurrent", "state"):
            state = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
            is_joined = len(wanted.uses[0]) == 2
            own = x if wanted.kind == "recurrent" else state
            taken.append(torch.cat([x, state], -1) if is_joined else own)
        return rows_of(taken[0], mask)

    @contextlib.contextmanager
    def _hooks(self, linear, embedding) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(linear)
            for module in self._owners.modules(torch.nn.Linear)
        ]
        if embedding is not None:
            handles += [
                module.register_forward_hook(embedding)
                for module in self._owners.modules(torch.nn.Embedding)
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def rows_of(x: torch.Tensor, mask: Optional[torch.Tensor]) -> torch.Tensor:
    """The positions of (B, T, C) that count, or all rows of (..., C), as (N, C)."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
