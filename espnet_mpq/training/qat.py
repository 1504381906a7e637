"""Quantization-aware training: gradients at the quantized weights move float weights and scales."""

from __future__ import annotations

import copy
from typing import Callable, Dict, Optional

import torch

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.plan import Plan
from espnet_mpq.quant.grid import Grid, make_grid
from espnet_mpq.quant.scale import spread
from espnet_mpq.training.attach import attach, check_state
from espnet_mpq.training.finishing import Finishing
from espnet_mpq.training.on_grid import (
    Mats,
    OnGrid,
    coded_names,
    copied_to,
    project,
    project_weights,
    relative_distance,
    share,
    stored_mats,
)
from espnet_mpq.training.options import QatOptions

STATE_KEY = "mpq_qat"
STATE_VERSION = 1
MARGIN = 0.02  # of the distance of two levels: how far inside its cell a weight starts


class QatController:
    """Straight-through training of the coded clusters of a module.

    Between two updates the module holds Q(W) = α times the level nearest to W / α, so its loss and
    gradients are those of what will be stored; the float W are kept here. An update
      moves the scales: dQ/dα = level - W/α inside the range of the grid, the outermost level
        outside (LSQ), by Adam on log α;
      gives the caller's optimizer W with the gradient by Q(W), passed where W is inside the
        range, and takes W back.
    16-bit clusters are trained the same way, without scales.

    The caller brackets every epoch by start_epoch() and end_epoch(); after either the module
    holds Q(W), and everything else is in ``optimizer.state_dict()["mpq_qat"]``.

    Args:
        weights, plan, optimizer: as AdmmController.
        options: QatOptions.
        start: α and V to start from (second-order rounding); None: the projection of the weights.

    Attributes:
        n_updates_in_epoch: set by the caller before the first start_epoch; the learning rate
            falls and the codes freeze by it. None: neither happens.

    Raises:
        PlanError: the plan does not fit the clusters.

    Source: Esser et al. 2020 (LSQ, arXiv 1902.08153) eq. 3; with Adam on the logarithm its factor
    1 / sqrt(N Q) has no effect. The pull: Zhang et al. 2026 (WinQ, arXiv 2605.17471).
    """

    def __init__(
        self,
        weights: ClusterWeights,
        plan: Plan,
        optimizer,
        options: QatOptions,
        start: Optional[OnGrid] = None,
    ):
        plan.check(weights.clusters.values())
        self.weights, self.plan, self.options, self.optimizer = weights, plan, options, optimizer
        self.coded = coded_names(plan)
        self.stored = [name for name, spec in plan.clusters.items() if spec.bits < 32]
        self.wants_gradient = False
        self.gradient_at: Optional[Callable[[], None]] = None
        self.grids: Dict[str, Grid] = {
            name: make_grid(plan.clusters[name].grid, plan.clusters[name].bits)
            for name in self.coded
        }
        self.n_updates_in_epoch: Optional[int] = None
        self.n_updates, self.n_updates_total = 0, None
        self.floats: Mats = {}  # W of the stored clusters
        self.tuned: Optional[Finishing] = None  # α and the codes
        self.is_frozen = False
        self._start, self._lrs = start, []
        attach(
            optimizer,
            STATE_KEY,
            "QAT",
            self._before_step,
            self._after_step,
            self.state_dict,
            self.load_state_dict,
        )

    # ---- one update ------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self) -> None:
        if self.tuned is None:
            raise InputError("QAT: optimizer.step() before start_epoch()")
        groups, factor = self.optimizer.param_groups, self.lr_factor()
        self._lrs = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * factor
        self.tuned.adam.param_groups[0]["lr"] = groups[0]["lr"] * self.options.scale_lr
        coded = {name: self.weights.grads(name) for name in self.coded}
        coded = {name: mats for name, mats in coded.items() if mats is not None}
        if self.is_frozen:
            self.tuned.step(coded)
            self._write({name: self.floats[name] for name in self._float_names()})
            return
        insides, slopes = {}, {}
        for name in coded:
            insides[name], slopes[name] = self._inside_and_slopes(name)
        self.tuned.step(coded, slopes)
        for name, mats in coded.items():
            for gradient, inside in zip(mats, insides[name]):
                gradient.mul_(inside)
        self._write(self.floats)  # what the optimizer is to move

    @torch.no_grad()
    def _after_step(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._lrs):
            group["lr"] = lr
        self.n_updates += 1
        if not self.is_frozen:
            self.floats = self._copy()
            self._make_codes()
            period = self.options.pull_period
            if period and self.n_updates % period == 0:
                for name, values in stored_mats(self.floats, self.tuned.current()).items():
                    for weight, value in zip(self.floats[name], values):
                        weight.lerp_(value, self.options.pull)
        elif self._float_names():
            self.floats.update(self._copy(self._float_names()))
        self._freeze_when_due()
        self._write(self._forward())

    def lr_factor(self) -> float:
        """Of the next update: the warm-up, and the fall to 0."""
        if not self.options.decay or not self.n_updates_total:
            return 1.0
        rising = (self.n_updates + 1) / (self.options.warmup + 1)
        return min(1.0, rising) * max(0.0, 1.0 - self.n_updates / self.n_updates_total)

    def _inside_and_slopes(self, name: str):
        """Per part: where W lies within the range of its grid, and dQ/dα there and outside."""
        grid, spec = self.grids[name], self.plan.clusters[name]
        low, high = _range(grid)
        insides, slopes = [], []
        table = self.tuned.current()
        for weight, scale, code in zip(self.floats[name], table.scales[name], table.codes[name]):
            wide = spread(scale, weight.shape[1], spec.group_size)
            ratio = weight / torch.where(wide > 0, wide, torch.full_like(wide, float("inf")))
            inside = (ratio >= low) & (ratio <= high)
            level = grid.values(code)
            insides.append(inside)
            slopes.append(torch.where(inside, level - ratio, level))
        return insides, slopes

    def _make_codes(self) -> None:
        """V: the levels nearest to W / α."""
        scales = self.tuned.current().scales
        for name in self.coded:
            spec = self.plan.clusters[name]
            for k, (weight, scale) in enumerate(zip(self.floats[name], scales[name])):
                wide = spread(scale, weight.shape[1], spec.group_size)
                divisor = torch.where(wide > 0, wide, torch.full_like(wide, float("inf")))
                codes = self.grids[name].codes_of(weight / divisor).to(torch.uint8)
                self.tuned.table.codes[name][k] = codes

    def _forward(self) -> Mats:
        """What the module computes with: Q(W), or a blend of W and Q(W) at the beginning."""
        values = stored_mats(self.floats, self.tuned.current())
        end = self.options.blend * (self.n_updates_total or 0)
        if self.n_updates >= end:
            return values
        share_of_q = self.n_updates / end
        return {
            name: [torch.lerp(w, q, share_of_q) for w, q in zip(self.floats[name], mats)]
            for name, mats in values.items()
        }

    def _freeze_when_due(self) -> None:
        if self.n_updates_total and not self.is_frozen:
            left = self.n_updates_total - self.n_updates
            self.is_frozen = left <= self.options.freeze * self.n_updates_total

    # ---- epochs ----------------------------------------------------------------------------

    @torch.no_grad()
    def start_epoch(self, n_epochs_left: int) -> None:
        """Begin, or go on: the module holds what the next forward pass needs.

        Args:
            n_epochs_left: epochs of the run still to come, the one that starts included.
        """
        if self.n_updates_in_epoch is not None:
            self.n_updates_total = self.n_updates + n_epochs_left * self.n_updates_in_epoch
        if self.tuned is None:
            self._begin()
        self._write(self._forward())

    @torch.no_grad()
    def end_epoch(self) -> None:
        """The module holds what a packed file would."""
        self._write(stored_mats(self.floats, self.tuned.current()))

    def _begin(self) -> None:
        self.floats = self._copy()
        mats = {name: self.floats[name] for name in self.coded}
        table = self._start
        if table is None:
            table = share(project(mats, self.plan, method="mse"))
        else:
            for name in self.coded:
                self.floats[name] = into_cells(mats[name], table, name, self.grids[name])
        codes = {name: list(codes) for name, codes in table.codes.items()}
        self.tuned = Finishing(OnGrid(self.plan, table.scales, codes), lr=0.0)

    # ---- the module's matrices -------------------------------------------------------------

    def _float_names(self):
        return [name for name in self.stored if name not in self.coded]

    def _copy(self, names=None) -> Mats:
        names = self.stored if names is None else names
        return {name: [m.float().clone() for m in self.weights.mats(name)] for name in names}

    def _write(self, mats: Mats) -> None:
        for name, values in mats.items():
            self.weights.set(name, values)

    # ---- reports and checkpoints -------------------------------------------------------------

    def stats(self, loss_nats: float) -> Dict[str, float]:
        """What an epoch reports: how far the float weights are from the quantized ones."""
        values = stored_mats(self.floats, self.tuned.current())
        return {
            "qat_distance": relative_distance(self.floats, values),
            "qat_frozen": float(self.is_frozen),
        }

    def is_idle(self) -> bool:
        """Whether epochs went by without a single update."""
        return self.tuned is not None and self.n_updates == 0

    def project(self, module: torch.nn.Module) -> None:
        """Put a copy of the module, an average of checkpoints, on the grid."""
        project_weights(ClusterWeights(module, self.weights.clusters.values()), self.plan)

    def state_dict(self) -> Dict:
        """Everything of QAT that a resumed run needs; tensors and plain values only."""
        return {
            "version": STATE_VERSION,
            "plan": self.plan.to_dict(provenance=False),
            "weights": {n: [m.clone() for m in mats] for n, mats in self.floats.items()},
            "tuned": None if self.tuned is None else copy.deepcopy(self.tuned.state_dict()),
            "n_updates": self.n_updates,
            "is_frozen": self.is_frozen,
        }

    def load_state_dict(self, state: Dict) -> None:
        """Take over a state_dict().

        Raises:
            MismatchError: written by another version or with another plan.
        """
        check_state(
            state,
            title="QAT",
            todo="resume with the plan that the run was started with",
            expected={"version": STATE_VERSION, "plan": self.plan.to_dict(provenance=False)},
        )
        device = self.weights.device
        self.floats = copied_to(state["weights"], device)
        self.n_updates, self.is_frozen = state["n_updates"], state["is_frozen"]
        if state["tuned"] is not None:
            table = OnGrid.from_dict(self.plan, state["tuned"]["start"], device)
            self.tuned = Finishing(table, lr=0.0)
            self.tuned.load_state_dict(state["tuned"])


def _range(grid: Grid):
    """The ratios W / α that a gradient may move: the cells of all levels, the outer ones cut."""
    levels = grid.levels
    return levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2


def into_cells(mats, table: OnGrid, name: str, grid: Grid):
    """The weights moved just inside the cells of a table's codes, where they are outside.

    Second-order rounding gives codes that are not the nearest ones; from these weights the
    nearest ones are.
    """
    levels = grid.levels_tensor(mats[0].device, torch.float32)
    middles, gaps = (levels[1:] + levels[:-1]) / 2, levels[1:] - levels[:-1]
    infinity = levels.new_tensor([float("inf")])
    low = torch.cat([-infinity, middles + MARGIN * gaps])
    high = torch.cat([middles - MARGIN * gaps, infinity])
    group_size, moved = table.plan.clusters[name].group_size, []
    for weight, scale, code in zip(mats, table.scales[name], table.codes[name]):
        wide = spread(scale.to(weight.device), weight.shape[1], group_size)
        wide = wide.expand_as(weight)
        code = code.to(weight.device).long()
        inside = torch.minimum(torch.maximum(weight, low[code] * wide), high[code] * wide)
        moved.append(torch.where(wide > 0, inside, weight))
    return moved
