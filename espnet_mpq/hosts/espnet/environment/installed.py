"""Is a module installed? Asked without importing it."""

from __future__ import annotations

import importlib.util


def is_installed(name: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
