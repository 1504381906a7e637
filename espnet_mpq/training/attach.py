"""Hooks on one optimizer: work before and after its step, and its saved state, checked."""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping

from espnet_mpq.errors import MismatchError


def attach(
    optimizer,
    key: str,
    title: str,
    before_step: Callable[[], None],
    after_step: Callable[[], None],
    state_dict: Callable[[], dict],
    load_state_dict: Callable[[dict], None],
) -> None:
    """Wrap ``step``, ``state_dict`` and ``load_state_dict`` on the instance.

    Hooks of torch 2 would do, but torch 1.13 has none. The state goes in and comes out under
    ``key``; a state_dict without it raises MismatchError, which names ``title``.
    """
    step, save, load = optimizer.step, optimizer.state_dict, optimizer.load_state_dict

    # wraps() keeps the marks by which LR schedulers recognise a step they count.
    @functools.wraps(step)
    def hooked_step(*args, **kwargs):
        before_step()
        result = step(*args, **kwargs)
        after_step()
        return result

    @functools.wraps(save)
    def hooked_state_dict(*args, **kwargs):
        return {**save(*args, **kwargs), key: state_dict()}

    @functools.wraps(load)
    def hooked_load_state_dict(state, *args, **kwargs):
        state = dict(state)
        if key not in state:
            raise MismatchError(
                f"checkpoint has no {title} state",
                found=f"a checkpoint of a run without {title}",
                todo="train into a new folder (--output_dir) and start from the fp LM with "
                "--init_param",
            )
        load_state_dict(state.pop(key))
        return load(state, *args, **kwargs)

    optimizer.step = hooked_step
    optimizer.state_dict = hooked_state_dict
    optimizer.load_state_dict = hooked_load_state_dict


def check_state(
    state: Mapping[str, Any], title: str, todo: str, expected: Mapping[str, Any]
) -> None:
    """Refuse a saved state whose version or plan is not that of the run that resumes.

    Args:
        title: the method that wrote the state, for the message.
        todo: what the user can do about it.
        expected: key -> value that the state must hold.

    Raises:
        MismatchError: a value is another one.
    """
    for key, mine in expected.items():
        if state.get(key) != mine:
            raise MismatchError(
                f"the {title} state in the checkpoint has another {key}",
                found=state.get(key),
                expected=mine,
                todo=todo,
            )
