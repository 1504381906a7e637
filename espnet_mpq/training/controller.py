"""Controller: what a training loop calls, whatever method trains the low-bit weights."""

from __future__ import annotations

from typing import Callable, Dict, Optional, Protocol

import torch


class Controller(Protocol):
    """A method that hangs on an optimizer (training/attach.py) and on the epochs of a run.

    All of its state is in ``optimizer.state_dict()``, so the caller's checkpoints hold it.
    Between epochs the module holds the weights that are validated and saved.

    Attributes:
        wants_gradient: whether a second gradient is needed in every update.
        gradient_at: set by the caller where it is: a function without arguments that fills the
            ``.grad`` of all parameters at their present values, on the mini-batches of the update
            under way.
        n_updates_in_epoch: optimizer updates of an epoch, set by the caller before start_epoch;
            None where it is not known.
    """

    wants_gradient: bool
    n_updates_in_epoch: Optional[int]
    gradient_at: Optional[Callable[[], None]]

    def start_epoch(self, n_epochs_left: int) -> None:
        """Before an epoch; ``n_epochs_left`` of the run, the one that starts included."""

    def end_epoch(self) -> None:
        """After the last update of an epoch, before validation."""

    def stats(self, loss_nats: float) -> Dict[str, float]:
        """What an epoch reports; ``loss_nats`` is that of the validation data."""

    def is_idle(self) -> bool:
        """Whether epochs went by, now or before a resume, without a single update."""

    def project(self, module: torch.nn.Module) -> None:
        """Give a copy of the module, an average of checkpoints, the form that is saved."""
