"""Copies of the recipes that write nothing into the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Recipe:
    """A copy of egs/<name> in the mini profile.

    Args:
        name: such as "an4/mpq1".
        folder: where the copy goes.
        data_root: handed over as $MPQ_DATA_ROOT; None: the recipe is told of no data.
    """

    def __init__(self, name: str, folder: Path, data_root: Path | None):
        self.folder = folder
        ignore = shutil.ignore_patterns("data", "exp", "downloads", "RESULTS.md")
        shutil.copytree(ROOT / "egs" / name, folder, ignore=ignore)
        self.env = {**os.environ, "MPQ_ROOT": str(ROOT), "MPQ_DATA_ROOT": str(data_root or "")}
        # Float activations: packed and quantized perplexity agree, whatever the tiny LM.
        self.env["MPQ_KERNEL"] = "reference"

    def run(self, *options: str, timeout_s: float = 540) -> subprocess.CompletedProcess:
        """./run.sh --mini true with these options; stdout holds all output."""
        return subprocess.run(
            ["./run.sh", "--mini", "true", "--python", sys.executable, *options],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def finish(self, *options: str) -> str:
        """run, which must succeed; its output."""
        result = self.run(*options)
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    def json(self, path: str):
        return json.loads((self.folder / path).read_text())
