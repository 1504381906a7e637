"""Figures from result files: the Pareto front of a plan and the map of a sensitivity table."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Union

from espnet_mpq.errors import FormatError, InputError
from espnet_mpq.io import read_json

LOG = logging.getLogger("espnet_mpq")
FilePath = Union[str, Path]


def pareto_figure(pareto: FilePath, output: FilePath) -> bool:
    """Draw pareto.json: predicted harm over effective bits, the chosen plan marked.

    The measured joint KL is drawn where the harms are of its unit, nats per token or frame.

    Returns False, with a message, when matplotlib is not installed.
    Raises InputError or FormatError for a file that is no Pareto front.
    """
    value = _read(pareto, "espnet_mpq.pareto")
    plt = _pyplot(output)
    if plt is None:
        return False
    points = value["points"]
    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    axes.plot(
        [p["effective_bits"] for p in points],
        [p["harm"] for p in points],
        drawstyle="steps-post",
        label="exact front",
    )
    chosen = value.get("chosen")
    if chosen:
        axes.plot(chosen["effective_bits"], chosen["harm"], "o", label="chosen, predicted")
        if chosen.get("joint_kl") is not None and value["unit"].startswith("nats/"):
            axes.errorbar(
                chosen["effective_bits"],
                chosen["joint_kl"],
                yerr=chosen.get("joint_kl_stderr"),
                fmt="s",
                label="chosen, measured",
            )
    if points and min(p["harm"] for p in points) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("effective bits (whole file)")
    axes.set_ylabel(f"predicted harm, {value['unit']}")
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(plt, figure, output)


def sensitivity_figure(table: FilePath, output: FilePath) -> bool:
    """Draw sensitivity.json as a map: clusters down, bits across, colour log10 of the harm.

    Returns and raises as `pareto_figure`.
    """
    value = _read(table, "espnet_mpq.sensitivity")
    plt = _pyplot(output)
    if plt is None:
        return False
    entries = value["entries"]
    clusters = list(entries)
    bits = sorted({int(b) for row in entries.values() for b in row})
    harms = [[entries[c].get(str(b), {}).get("harm") for b in bits] for c in clusters]
    colours = [[math.log10(h) if h is not None and h > 0 else math.nan for h in r] for r in harms]
    figure, axes = plt.subplots(
        figsize=(2 + 1.1 * len(bits), 1.2 + 0.32 * len(clusters)), constrained_layout=True
    )
    image = axes.imshow(colours, aspect="auto", cmap="viridis")
    for i, row in enumerate(harms):
        for k, harm in enumerate(row):
            if harm is not None:
                box = {"facecolor": "white", "alpha": 0.6, "pad": 1, "linewidth": 0}
                axes.text(k, i, f"{harm:.1e}", ha="center", va="center", fontsize=7, bbox=box)
    axes.set_xticks(range(len(bits)))
    axes.set_xticklabels(bits)
    axes.set_yticks(range(len(clusters)))
    axes.set_yticklabels(clusters)
    axes.set_xlabel("bits")
    figure.colorbar(image, label=f"log10 harm ({value['method']}), {value['unit']}")
    return _save(plt, figure, output)


def _read(path: FilePath, expected: str) -> dict:
    value = read_json(path)
    found = value.get("format") if isinstance(value, dict) else None
    if found != expected:
        raise FormatError(f"{path} is of another kind", found=repr(found), expected=repr(expected))
    return value


def _pyplot(output: FilePath):
    try:
        import matplotlib
    except ImportError:
        LOG.warning("%s is not drawn: matplotlib is not installed (pip install matplotlib)", output)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt, figure, output: FilePath) -> bool:
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(output, dpi=120)
    except OSError as error:
        raise InputError(f"cannot write {output}", found=error.strerror or error) from error
    finally:
        plt.close(figure)
    return True
