"""ADMM training at low bits: the papers' three steps as a controller on an optimizer."""

from __future__ import annotations

import logging
from typing import Callable, Dict, Optional

import torch

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.plan import Plan
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
from espnet_mpq.training.options import TABLE_PRIMAL, AdmmOptions

LOG = logging.getLogger("espnet_mpq")
STATE_KEY = "mpq_admm"
STATE_VERSION = 1


class AdmmController:
    """Minimise F(Θ) subject to Θ = f(Θ) = αV for the coded clusters of a module.

    Augmented Lagrangian: F(Θ) + γ/2 ||Θ - αV + λ||² - γ/2 ||λ||², λ the scaled dual.
      step 1  Θ: a step of the caller's optimizer on ∇F(Θ) + γ(Θ - αV + λ); optionally the
              gradient is taken at the extragradient probe Θ - η1 ∇L(Θ)
      step 2  α, V: projection of Θ + λ
      step 3  λ <- λ + Θ - αV
    Step 1 happens in every optimizer.step(); steps 2 and 3 every ``dual_period``
    updates or once per epoch. 16-bit clusters train as floats and are rounded when stored.

    The caller brackets every epoch by start_epoch() and end_epoch(). Between epochs the
    module holds the projected weights; the float Θ, λ, α, V and all counters are in
    ``optimizer.state_dict()["mpq_admm"]`` and nowhere else, and come back through
    ``optimizer.load_state_dict``.

    Args:
        weights: of the module that trains, with all of its clusters.
        plan: bits, grid and tying of these clusters.
        optimizer: any torch optimizer over its parameters; its methods ``step``,
            ``state_dict``, ``load_state_dict`` are wrapped on the instance (hooks of torch 2
            are not in torch 1.13).
        options: AdmmOptions.

    Attributes:
        gradient_at: set by the caller for the extragradient: a function without arguments
            that fills the ``.grad`` of all parameters with ∇F at their present values, on the
            mini-batches of the update under way (the controller clears old gradients first).

    Raises:
        PlanError: the plan does not fit the clusters.

    Source: Xu et al. 2021 (arXiv 2112.11438) section IV, Algorithm 1, with Θ + λ projected.
    """

    def __init__(self, weights: ClusterWeights, plan: Plan, optimizer, options: AdmmOptions):
        plan.check(weights.clusters.values())
        self.weights, self.plan, self.options, self.optimizer = weights, plan, options, optimizer
        self.coded = coded_names(plan)
        self.stored = [name for name, spec in plan.clusters.items() if spec.bits < 32]
        self.wants_gradient, self.n_updates_in_epoch = options.extragradient, None
        self.gradient_at: Optional[Callable[[], None]] = None

        self.table: Optional[OnGrid] = None  # α, V
        self.dual: Mats = {}  # λ
        self.goal: Mats = {}  # αV - λ, what the penalty pulls Θ to
        self.gamma = options.gamma
        self.n_updates = 0
        self.residuals = {"primal": 1.0, "dual": 0.0}  # relative; 1 until the first epoch ends
        self.finishing: Optional[Finishing] = None
        self._float_weights: Optional[Mats] = None  # Θ while the module holds projected weights
        attach(
            optimizer,
            STATE_KEY,
            "ADMM",
            self._before_step,
            self._after_step,
            self.state_dict,
            self.load_state_dict,
        )

    # ---- step 1: the weights -------------------------------------------------------------

    def _before_step(self) -> None:
        if self.table is None:
            raise InputError("ADMM: optimizer.step() before start_epoch()")
        if self.finishing is not None:
            gradients = {n: g for n, g in self._mats_of_gradients().items() if n in self.coded}
            self.finishing.step(gradients)
        elif self.options.extragradient:
            self._extragradient()
        else:
            self._add_penalty()

    def _after_step(self) -> None:
        self.n_updates += 1
        if self.finishing is not None:
            # Whatever the optimizer did to the coded weights, W = αV with the tuned α.
            self._write(stored_coded(self.finishing.current()))
            return
        period = self.options.dual_period
        if period and self.n_updates % period == 0:
            self._update_table_and_dual()

    @torch.no_grad()
    def _add_penalty(self) -> None:
        """∇L(Θ) = ∇F(Θ) + γ(Θ - αV + λ), in place on the gradients."""
        gradients = self._mats_of_gradients()
        for name in self.coded:
            if name not in gradients:
                continue
            mats = self.weights.mats(name)
            for gradient, weight, goal in zip(gradients[name], mats, self.goal[name]):
                gradient.add_((weight - goal).to(gradient.dtype), alpha=self.gamma)

    def _extragradient(self) -> None:
        """Replace ∇L(Θ) by ∇L(Θ̄), Θ̄ = Θ - η1 ∇L(Θ); Θ itself is left where it is."""
        if self.gradient_at is None:
            raise InputError("ADMM extragradient: no function to evaluate the second gradient")
        self._add_penalty()
        groups = self.optimizer.param_groups
        parameters = [p for g in groups for p in g["params"] if p.grad is not None]
        origin = [p.detach().clone() for p in parameters]
        first = [p.grad.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, gradient in zip(parameters, first):
                p.sub_(gradient, alpha=self.options.eta1)
                p.grad.zero_()
        self.gradient_at()
        self._add_penalty()
        with torch.no_grad():
            usable = all(bool(torch.isfinite(p.grad).all()) for p in parameters)
            for p, value, gradient in zip(parameters, origin, first):
                p.copy_(value)
                if not usable:  # the probe left the finite region: a plain gradient step
                    p.grad.copy_(gradient)

    # ---- steps 2 and 3: table and dual ---------------------------------------------------

    @torch.no_grad()
    def _update_table_and_dual(self) -> None:
        weights = self._coded_weights()
        previous = stored_coded(self.table)
        with_dual = {
            name: [w + u for w, u in zip(weights[name], self.dual[name])] for name in self.coded
        }
        projected = project(
            with_dual,
            self.plan,
            method=self.options.projection,
            start=self.table,
            rounds=self.options.als_rounds,
        )
        self.table = share(projected)
        values = stored_coded(self.table)
        for name in self.coded:
            for dual, weight, value in zip(self.dual[name], weights[name], values[name]):
                dual.add_(weight - value)
        self.residuals["dual"] = relative_distance(values, previous)
        self._set_goal(values)

    def _set_goal(self, values: Mats) -> None:
        self.goal = {
            name: [v - u for v, u in zip(values[name], self.dual[name])] for name in self.coded
        }

    def _grow_gamma(self) -> None:
        if self.options.gamma_schedule != "growing":
            return
        larger = min(self.gamma * self.options.gamma_growth, self.options.gamma_max)
        for duals in self.dual.values():
            for dual in duals:
                dual.mul_(self.gamma / larger)  # γλ, the true multiplier, stays what it is
        self.gamma = larger
        self._set_goal(stored_coded(self.table))

    # ---- epochs --------------------------------------------------------------------------

    @torch.no_grad()
    def start_epoch(self, n_epochs_left: int) -> None:
        """Put the float weights back and begin the finishing phase when it is time.

        A run that is prolonged in or after its finishing phase goes back to the three steps,
        from the finished table, with the dual at zero and a gamma that grows again to what
        it had reached.

        Args:
            n_epochs_left: epochs of the run still to come, the one that starts included.
        """
        self.restore_weights()
        if self.table is None:
            self._open(share(project(self._coded_weights(), self.plan, method="mse")))
        is_last = n_epochs_left <= self.options.finish_epochs
        if self.finishing is None and is_last:
            self._begin_finishing()
        elif self.finishing is not None and not is_last:
            LOG.warning(
                "ADMM: %d epochs to come, --mpq_finish_epochs is %d: the codes, frozen by an "
                "earlier finishing phase, are trained again",
                n_epochs_left,
                self.options.finish_epochs,
            )
            self._open(self.finishing.current())
            self.finishing = None
            if self.options.gamma_schedule == "growing":
                # At the gamma of a run's end the codes hardly move.
                n_epochs = n_epochs_left - self.options.finish_epochs
                lower = self.gamma * float(self.options.gamma_growth) ** -n_epochs
                self.gamma = max(lower, self.options.gamma)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Close the epoch: steps 2 and 3 if they are due, γ, residuals, projected weights."""
        if self.finishing is None:
            if self.options.dual_period == 0:
                self._update_table_and_dual()
            self.residuals["primal"] = relative_distance(
                self._coded_weights(), stored_coded(self.table)
            )
            self._grow_gamma()
        self.project_weights()

    @torch.no_grad()
    def project_weights(self) -> None:
        """Keep Θ aside and write the weights that a packed file would hold into the LM."""
        if self._float_weights is not None:
            return
        weights = {n: self.weights.mats(n) for n in self.stored}
        kept = {n: [mat.clone() for mat in mats] for n, mats in weights.items()}
        self._write(stored_mats(kept, self._saved_table(kept)))
        self._float_weights = kept

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Write Θ back into the LM."""
        if self._float_weights is not None:
            self._write(self._float_weights)
            self._float_weights = None

    def _saved_table(self, weights: Mats) -> OnGrid:
        if self.finishing is not None:
            return self.finishing.current()
        converged = self.residuals["primal"] < TABLE_PRIMAL
        if self.options.saved == "table" or (self.options.saved == "auto" and converged):
            return self.table
        return project(weights, self.plan, method="mse")

    def _open(self, table: OnGrid) -> None:
        """Start the three steps from a table, with the dual at zero."""
        values = stored_coded(table)
        self.table = table
        self.dual = {n: [torch.zeros_like(v) for v in values[n]] for n in self.coded}
        self._set_goal(values)

    def _begin_finishing(self) -> None:
        start = share(self._saved_table(self._coded_weights()))
        self.finishing = Finishing(start, self.options.finish_lr)
        self.table = self.finishing.table
        self.dual, self.goal = {}, {}
        self.residuals = {"primal": 0.0, "dual": 0.0}
        self._write(stored_coded(self.finishing.current()))

    # ---- the module's matrices ---------------------------------------------------------------

    def _coded_weights(self) -> Mats:
        return {n: [m.float() for m in self.weights.mats(n)] for n in self.coded}

    def _mats_of_gradients(self) -> Mats:
        """Views into the gradients, shaped as get_mats; clusters with frozen parts are left out."""
        found = {name: self.weights.grads(name) for name in self.weights.clusters}
        return {name: gradients for name, gradients in found.items() if gradients is not None}

    def _write(self, mats: Mats) -> None:
        for name, values in mats.items():
            self.weights.set(name, values)

    # ---- reports and checkpoints -----------------------------------------------------------

    def is_idle(self) -> bool:
        """Whether epochs went by, now or before a resume, without a single update."""
        return self.table is not None and not self.n_updates

    def project(self, module: torch.nn.Module) -> None:
        """Put a copy of the module, an average of checkpoints, on the grid of the plan."""
        project_weights(ClusterWeights(module, self.weights.clusters.values()), self.plan)

    def stats(self, loss_nats: float) -> Dict[str, float]:
        """What an epoch reports: relative residuals and γ."""
        return {
            "admm_primal": self.residuals["primal"],
            "admm_dual": self.residuals["dual"],
            "admm_gamma": self.gamma,
        }

    def state_dict(self) -> Dict:
        """Everything of ADMM that a resumed run needs; tensors and plain values only."""
        return {
            "version": STATE_VERSION,
            "plan": self.plan.to_dict(provenance=False),
            "float_weights": self._float_weights,
            "table": None if self.table is None else self.table.to_dict(),
            "dual": self.dual,
            "gamma": self.gamma,
            "n_updates": self.n_updates,
            "residuals": dict(self.residuals),
            "finishing": None if self.finishing is None else self.finishing.state_dict(),
        }

    def load_state_dict(self, state: Dict) -> None:
        """Take over a state_dict().

        Raises:
            MismatchError: written by another version or with another plan.
        """
        check_state(
            state,
            title="ADMM",
            todo="train into a new folder (--output_dir) or delete checkpoint.pth",
            expected={"version": STATE_VERSION, "plan": self.plan.to_dict(provenance=False)},
        )
        device, floats, table = self.weights.device, state["float_weights"], state["table"]
        self._float_weights = floats and copied_to(floats, device)
        self.table = table and OnGrid.from_dict(self.plan, table, device)
        self.dual = copied_to(state["dual"], device)
        self.gamma, self.n_updates = state["gamma"], state["n_updates"]
        self.residuals = dict(state["residuals"])
        self.finishing = None
        if state["finishing"] is not None:
            start = OnGrid.from_dict(self.plan, state["finishing"]["start"], device)
            self.finishing = Finishing(start, self.options.finish_lr)
            self.finishing.load_state_dict(state["finishing"])
        elif self.table is not None:
            self._set_goal(stored_coded(self.table))


def stored_coded(table: OnGrid) -> Mats:
    """αV of every coded cluster."""
    return {name: table.values(name) for name in table.codes}
