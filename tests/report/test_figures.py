"""Figures: drawn from files, refused for other files, skipped with a message without matplotlib."""

from __future__ import annotations

import builtins
import logging

import pytest

from espnet_mpq.errors import FormatError
from espnet_mpq.io import write_json
from espnet_mpq.report.figures import pareto_figure, sensitivity_figure


@pytest.fixture
def files(tmp_path):
    points = [
        {"n_bytes": 10 * k, "effective_bits": float(k), "harm": 4.0**-k, "bits": [k]}
        for k in (1, 2, 4)
    ]
    chosen = {**points[1], "joint_kl": 0.1, "joint_kl_stderr": 0.01}
    pareto, table = tmp_path / "pareto.json", tmp_path / "sensitivity.json"
    head = {"format": "espnet_mpq.pareto", "unit": "nats/token"}
    write_json(pareto, {**head, "points": points, "chosen": chosen})
    entries = {
        "embedding": {"1": {"harm": 0.5}, "2": {"harm": 1e-4}},
        "output": {"1": {"harm": -1e-3}},
    }
    head = {"format": "espnet_mpq.sensitivity", "method": "fisher", "unit": "nats/token"}
    write_json(table, {**head, "entries": entries})
    return pareto, table


def test_figures_are_png_files(files, tmp_path):
    pytest.importorskip("matplotlib")
    for draw, source in zip((pareto_figure, sensitivity_figure), files):
        output = tmp_path / "figures" / f"{source.stem}.png"
        assert draw(source, output) is True
        assert output.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_other_files_are_refused(files, tmp_path):
    with pytest.raises(FormatError, match="espnet_mpq.pareto"):
        pareto_figure(files[1], tmp_path / "x.png")
    with pytest.raises(FormatError, match="espnet_mpq.sensitivity"):
        sensitivity_figure(files[0], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib_a_message(files, tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(logging.getLogger("espnet_mpq"), "propagate", True)
    with caplog.at_level(logging.WARNING, "espnet_mpq"):
        assert pareto_figure(files[0], tmp_path / "x.png") is False
    assert "matplotlib is not installed" in caplog.text
