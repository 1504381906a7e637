"""The weights in a checkpoint of the host: the one way to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Union

from espnet_mpq.errors import CheckpointError
from espnet_mpq.state_file import EXPECTED, TRAINER_KEYS, read_file, trainer_error


def read_state(checkpoint: Union[str, Path]) -> dict:
    """The state dict in a checkpoint of the host, tensors on the CPU; its names are not checked.

    Raises:
        CheckpointError: another kind of file, a damaged one, one with Python objects, or one
            that holds other things than tensors.
    """
    state = read_file(checkpoint)
    if isinstance(state, dict) and TRAINER_KEYS <= set(state):
        raise trainer_error(checkpoint)
    if isinstance(state, dict) and isinstance(state.get("module"), dict):  # written by deepspeed
        state = state["module"]
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{checkpoint} holds no weights", found=type(state).__name__, expected=EXPECTED
        )
    return state
