"""What the reports of the recipes share: the bits of a packed LM, versions, machine, times."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import espnet_mpq

NVIDIA = Path("/proc/driver/nvidia")
SECONDS = {"hour": 3600, "minute": 60, "second": 1}


def plan_lines(receipt: dict) -> List[str]:
    """A Markdown table with one line per cluster of a packed LM, from its receipt.json."""
    lines = ["| cluster | bits | weights | bytes | relative error |", "|---|---:|---:|---:|---:|"]
    for row in receipt["clusters"]:
        lines.append(
            f"| {row['cluster']} | {row['bits']} | {row['n_weights']} | {row['n_bytes']} "
            f"| {row['relative_error']:.4f} |"
        )
    return lines


def job_seconds(log: Path) -> Optional[float]:
    """Seconds of a job of host_jobs, from the ends in its log; a job that went on has several."""
    found = re.findall(r"^# done in ([0-9.]+) s$", log.read_text(errors="replace"), re.M)
    return sum(map(float, found)) if found else None


def training_seconds(log: Path) -> Optional[float]:
    """Seconds that the host's epochs took, from its log; right for a run that was resumed too."""
    seconds = {}
    for line in log.read_text(errors="replace").splitlines():
        epoch = re.search(r"(\d+)epoch results: ", line)
        if epoch:
            # one duration for training, one for validation: "1 hour, 2 minutes and 3.4 seconds"
            times = re.findall(r"\btime=((?:[\d.]+ (?:hour|minute|second)s?(?:, | and )?)+)", line)
            parts = re.findall(r"([\d.]+) (hour|minute|second)", " ".join(times))
            seconds[epoch.group(1)] = sum(float(n) * SECONDS[unit] for n, unit in parts)
    return sum(seconds.values()) if seconds else None


def versions() -> str:
    """Python, torch, the host and this package."""
    names = [f"Python {platform.python_version()}"]
    for package in ("torch", "espnet"):
        try:
            names.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            pass
    return ", ".join([*names, f"espnet_mpq {espnet_mpq.__version__}"])


def machine() -> str:
    """Processor, cores, and whether there is an NVIDIA GPU."""
    cpu = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [x for x in cpu_info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return f"{cpu}, GPU." if NVIDIA.exists() else f"{cpu}, {os.cpu_count()} cores, no GPU."


def stage_seconds(marks: Sequence[Path], stages: Sequence[str]) -> Dict[int, int]:
    """Number of a stage -> seconds of its last run, as stages.sh wrote them into ``marks``."""
    seconds = {}
    for number, name in enumerate(stages, 1):
        for folder in marks:
            file = folder / f"{name}.seconds"
            if file.is_file():
                seconds[number] = int(file.read_text())
    return seconds


def stage_times(seconds: Dict[int, int]) -> str:
    """One sentence on the stages of a recipe."""
    times = ", ".join(f"{stage}: {seconds[stage]}" for stage in sorted(seconds))
    total = sum(seconds.values())
    return f"Seconds of the last run of every stage: {times}; together {total}."
