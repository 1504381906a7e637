"""NIST sclite, run as the host's scoring stage runs it, where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Sequence

import pytest


def sclite_command(name: str = "sclite") -> List[str]:
    """The tool's command line; skips the test without it."""
    if shutil.which("sctk"):
        return ["sctk", name]
    if not shutil.which(name):
        pytest.skip("NIST sctk is not installed")
    return [name]


def write_trn(path: Path, utts: Sequence[str], lines: Sequence[str]) -> None:
    content = "".join(f"{line}\t({utt})\n" for utt, line in zip(utts, lines))
    path.write_text(content, encoding="utf-8")


def run_sclite(folder: Path, *options: str) -> str:
    """`ref.trn` against `hyp.trn` in ``folder``; what is printed."""
    command = [*sclite_command(), *options, "-r", "ref.trn", "trn", "-h", "hyp.trn", "trn"]
    done = subprocess.run(
        [*command, "-i", "rm", "-o", "all", "stdout"], cwd=folder, capture_output=True, check=True
    )
    return done.stdout.decode("utf-8", "replace")


def scores(printed: str) -> Dict[str, tuple]:
    """utterance -> (correct, substitutions, deletions, insertions)."""
    found = re.findall(r"id: \((\S+)\)\nScores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)", printed)
    return {utt: tuple(map(int, counts)) for utt, *counts in found}
