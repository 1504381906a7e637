"""Smoke run of the rounding benchmark: second order loses less on the tiny LM, at every tying."""

import runpy
from pathlib import Path


def test_second_order_rounding_loses_less_at_every_tying(fp_exp, text_file):
    main = runpy.run_path(str(Path(__file__).with_name("bench_rounding.py")))["main"]
    text = ["--text", str(text_file), "--test", str(text_file)]
    rows = main(["--lm_exp", str(fp_exp.path), *text, "--bits", "2", "--all_tyings"])
    assert [row["scales"] for row in rows] == ["row", "group", "cluster", "model"]
    assert all(0 < row["second_order"] < row["nearest"] for row in rows)
    assert all(row["second_order"] < 0.6 * row["nearest"] for row in rows[:3])
