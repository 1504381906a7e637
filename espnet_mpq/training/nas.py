"""Training of a super-network: temperature, size penalty and Adam of the logits on an optimizer."""

from __future__ import annotations

import logging
import math
from typing import Dict

import torch

from espnet_mpq.errors import MismatchError
from espnet_mpq.training.attach import attach

LOG = logging.getLogger("espnet_mpq")
STATE_KEY = "mpq_nas"
STATE_VERSION = 1
OVER_BUDGET = 1000.0  # added to the loss by which the best epoch is chosen
ADAM_BETAS = (0.5, 0.999)  # as DARTS has it: the logits follow a moving target


class NasController:
    """What search.nas needs of a training loop.

    The logits have an Adam of their own (the weights' learning rate says nothing about them):
    their gradient is taken from under the optimizer in every ``step`` and gets that of the
    size penalty added. All state, but for logits and weights, is in
    ``optimizer.state_dict()["mpq_nas"]``.

    The caller brackets every epoch by start_epoch() and end_epoch().

    Args:
        penalty: search.nas.Penalty, with the mixture and its options.
        candidates: search.candidates.Candidates of the LM.
        optimizer: any torch optimizer; wrapped on the instance (training/attach.py).
        max_epoch: epochs of the whole run.
    """

    def __init__(self, penalty, candidates, optimizer, max_epoch: int):
        self.penalty, self.mixture = penalty, penalty.mixture
        self.candidates, self.max_epoch = candidates, max_epoch
        self.options = self.mixture.options
        logits = self.mixture.logits
        self.adam = torch.optim.Adam([logits], lr=self.options.lr, betas=ADAM_BETAS)
        self.wants_gradient, self.gradient_at, self.n_updates_in_epoch = False, None, None
        self.n_updates = 0
        self.settling = self._started = False
        attach(
            optimizer,
            STATE_KEY,
            "NAS",
            self._before_step,
            self._after_step,
            self.state_dict,
            self.load_state_dict,
        )

    def start_epoch(self, n_epochs_left: int) -> None:
        """Set T; ``n_epochs_left`` of the run, the one that starts included."""
        options = self.options
        self._started = True
        done = 1.0 - (n_epochs_left - 1) / max(self.max_epoch - 1, 1)
        ratio = options.final_temperature / options.temperature
        self.mixture.temperature = options.temperature * ratio ** min(max(done, 0.0), 1.0)
        # At least the last epoch, and not the first of several.
        n_settling = max(1, min(math.ceil(options.settle * self.max_epoch), self.max_epoch - 1))
        self.settling = n_epochs_left <= n_settling
        if options.phase != "architecture":
            self.candidates.refresh()

    def end_epoch(self) -> None:
        """Log the one-best plan."""
        bits = self.mixture.one_best()
        LOG.info("one-best plan: %s", " ".join(f"{name}={b}" for name, b in bits.items()))

    def _before_step(self) -> None:
        logits = self.mixture.logits
        if not logits.requires_grad:
            return
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.penalty(), logits)
        logits.grad = gradient if logits.grad is None else logits.grad + gradient
        before = logits.detach().clone()
        self.adam.step()
        logits.grad = None  # the optimizer passes over parameters without one
        if self.settling and self.options.penalty == "budget":
            self.mixture.hold(before)
        self.penalty.update(self.settling)

    def _after_step(self) -> None:
        self.n_updates += 1
        trains_weights = self.options.phase != "architecture"
        if trains_weights and self.n_updates % self.options.refresh_updates == 0:
            self.candidates.refresh()

    def is_idle(self) -> bool:
        """Whether epochs went by without a single update."""
        return self._started and not self.n_updates

    def project(self, module: torch.nn.Module) -> None:
        """Leaves a copy of the super-network as it is: its weights are no grid's."""

    @torch.no_grad()
    def stats(self, loss_nats: float) -> Dict[str, float]:
        """What an epoch reports.

        Args:
            loss_nats: of the one-best path on the validation text.

        Returns:
            nas_n_bytes (one-best), nas_expected_n_bytes (at softmax(a / T)), nas_budget_n_bytes,
            nas_temperature, nas_multiplier (nats per relative overshoot), nas_entropy (nats per
            cluster, at T = 1), and nas_loss: loss_nats, but OVER_BUDGET more when the one-best
            plan does not fit; the best epoch is the one where it is least.
        """
        mixture = self.mixture
        n_bytes = mixture.choice_n_bytes(mixture.one_best())
        overshoot = mixture.overshoot(n_bytes)
        p = mixture.probabilities()
        expected = mixture.expected_n_bytes(mixture.probabilities(mixture.temperature))
        fits = overshoot <= 0 or self.options.penalty == "paper"
        return {
            "nas_loss": loss_nats + (0.0 if fits else OVER_BUDGET * (1.0 + overshoot)),
            "nas_n_bytes": float(n_bytes),
            "nas_expected_n_bytes": float(expected),
            "nas_budget_n_bytes": float(mixture.budget_n_bytes),
            "nas_temperature": mixture.temperature,
            "nas_multiplier": self.penalty.multiplier,
            "nas_entropy": float(-(p * p.clamp(min=1e-30).log()).sum(dim=1).mean()),
        }

    def state_dict(self) -> dict:
        """Everything a resumed run needs besides weights and logits; plain values and tensors."""
        return {
            "version": STATE_VERSION,
            "options": self.options.to_dict(),
            "budget_n_bytes": self.mixture.budget_n_bytes,
            "multiplier": self.penalty.multiplier,
            "boost": self.penalty.boost,
            "n_updates": self.n_updates,
            "adam": self.adam.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over a state_dict(); raises MismatchError for another version, options or budget."""
        mine = self.state_dict()
        for key in ("version", "options", "budget_n_bytes"):
            if state.get(key) != mine[key]:
                raise MismatchError(
                    f"the NAS state in the checkpoint has other {key}",
                    found=state.get(key),
                    expected=mine[key],
                    todo="train into a new folder (--output_dir) or delete checkpoint.pth",
                )
        self.penalty.multiplier, self.penalty.boost = state["multiplier"], state["boost"]
        self.n_updates = state["n_updates"]
        self.adam.load_state_dict(state["adam"])
