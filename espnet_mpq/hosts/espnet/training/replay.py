"""Replay: the gradient of the update under way, once more, at other parameter values."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, List, Tuple

import torch
from espnet2.torch_utils.device_funcs import to_device
from espnet2.torch_utils.recursive_op import recursive_average
from espnet2.train.trainer import autocast, autocast_args


class Replay:
    """Records the mini-batches of the accumulation window and repeats their gradients.

    The host hands batches out, accumulates, and closes every window with
    ``optimizer.zero_grad()``. Watching the iterator and zero_grad therefore gives exactly
    the batches of the update under way, with the random state each of them started from
    (the same dropout masks in both evaluations).

    Args:
        model: what the host calls (the ESPnet model, or DDP around it).
        optimizer: its zero_grad is wrapped on the instance.
        scaler: the host's GradScaler or None; also tells whether autocast is on.
        options: the host's TrainerOptions (ngpu, accum_grad, grad_clip, grad_clip_type).
        distributed: whether several processes share the update.
    """

    def __init__(self, model, optimizer, scaler, options, distributed: bool):
        self.model, self.scaler, self.options = model, scaler, options
        self.distributed = distributed
        self.window: List[Tuple[dict, tuple]] = []
        self._optimizer = optimizer
        self._zero_grad = optimizer.zero_grad

    @contextmanager
    def watching(self, iterator) -> Iterator["_Watched"]:
        """Record the batches of one epoch."""

        def zero_grad(*args, **kwargs):
            self.window.clear()
            return self._zero_grad(*args, **kwargs)

        self._optimizer.zero_grad = zero_grad
        try:
            yield _Watched(iterator, self.window)
        finally:
            self._optimizer.zero_grad = self._zero_grad
            self.window.clear()

    def __call__(self) -> None:
        """Add the gradients of all recorded batches to ``.grad``, unscaled and clipped."""
        present = _random_state()
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        for batch, state in self.window:
            _set_random_state(state)
            self._backward(batch, scale)
        _set_random_state(present)
        parameters = list(self.model.parameters())
        if scale != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        torch.nn.utils.clip_grad_norm_(
            parameters, max_norm=self.options.grad_clip, norm_type=self.options.grad_clip_type
        )

    def _backward(self, batch: dict, scale: float) -> None:
        # The loss as Trainer.train_one_epoch of the host forms it.
        batch = to_device(batch, "cuda" if self.options.ngpu > 0 else "cpu")
        with autocast(self.scaler is not None, **autocast_args):
            result = self.model(**batch)
            if isinstance(result, dict):
                loss, weight = result["loss"], result["weight"]
            else:
                loss, _, weight = result
            if self.options.ngpu > 1 or self.distributed:
                loss = (loss * weight.type(loss.dtype)).sum()
                _, weight = recursive_average({}, weight, self.distributed)
                loss = loss / weight
            if self.distributed:
                loss = loss * torch.distributed.get_world_size()
            loss = loss / self.options.accum_grad
        (loss * scale).backward()


class _Watched:
    """The host's iterator, noting every batch and the random state it is used with."""

    def __init__(self, iterator, window: List[Tuple[dict, tuple]]):
        self.iterator, self.window = iterator, window

    def __iter__(self):
        for utt_id, batch in self.iterator:
            # The host adds utt_id to this very dict before it calls the model.
            self.window.append((batch, _random_state()))
            yield utt_id, batch

    def __len__(self) -> int:
        return len(self.iterator)


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
