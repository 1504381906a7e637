"""How a benchmark measures: systems in turn, round after round, medians; and on what machine."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable, Dict

import torch

# step(tokens (B,), state) -> log-probabilities (B, V), state; a state of None is the start
Step = Callable


def latency_s(step: Step, tokens, least_s: float, clock) -> float:
    """Seconds per step, each going on from the state before; the first is not counted."""
    _, state = step(tokens, None)
    n, start_s = 0, clock()
    while n < 1 or clock() - start_s < least_s:
        _, state = step(tokens, state)
        n += 1
    return (clock() - start_s) / n


def alternate(measures: Dict[str, Callable[[], float]], n_rounds: int) -> Dict[str, float]:
    """name -> median of what its measure returns; every round calls all of them in turn."""
    found = {name: [] for name in measures}
    for _ in range(n_rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict:
    """What a table of timings must say: CPU, kernel path, versions."""
    from espnet_mpq.kernels import dispatch

    packages = {"torch": torch.__version__}
    for name in ("espnet", "onnxruntime"):
        if importlib.util.find_spec(name.replace("espnet", "espnet2")):
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                packages[name] = "unknown version"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "kernel": dispatch.choose(),
        "paths": list(dispatch.available_paths()),
        "python": platform.python_version(),
        "packages": packages,
    }


def same_machine(one: dict, other: dict) -> bool:
    """Whether rows of both may stand in one table; one may lack a package of the other."""
    ours, theirs = one["packages"], other.get("packages", {})
    same = all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    return same and all(one[key] == other.get(key) for key in one if key != "packages")


def today() -> str:
    return datetime.date.today().isoformat()


def revision() -> str:
    """The commit of this checkout, with a "+" where the package was changed since; else ""."""

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(Path(__file__).resolve().parents[2]), *words]
        return subprocess.run(command, capture_output=True, text=True)

    try:
        commit = git("rev-parse", "--short=7", "HEAD")
        if commit.returncode:
            return ""
        changed = git("diff", "--quiet", "HEAD", "--", "espnet_mpq").returncode
    except OSError:
        return ""
    return commit.stdout.strip() + ("+" if changed else "")
