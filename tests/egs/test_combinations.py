"""The AN4 recipe with every LM type and sensitivity, mini profile: 8 runs, opt-in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from recipes import Recipe  # noqa: E402

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("MPQ_ALL_COMBINATIONS"),
        reason="MPQ_ALL_COMBINATIONS is not set: 8 runs of a recipe take minutes; "
        "tests/egs/test_ami_recipe.py runs the LM stages of all of them",
    ),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, data_root):
    return Recipe("an4/mpq1", tmp_path_factory.mktemp("an4") / "mpq1", data_root)


@pytest.mark.parametrize("lm_type", ["rnn", "transformer"])
@pytest.mark.parametrize("sensitivity", ["uniform", "kl", "hessian", "nas"])
def test_combination(recipe, lm_type, sensitivity):
    output = recipe.finish("--lm_type", lm_type, "--sensitivity", sensitivity)
    lms = f"exp/mini_char/{lm_type}"
    totals = recipe.json(f"{lms}/{sensitivity}/packed/receipt.json")["totals"]
    assert sensitivity == "uniform" or totals["effective_bits"] <= 4.0
    quantized, packed = (
        recipe.json(f"{lms}/{sensitivity}/{name}/perplexity_test.json")["ppl"]
        for name in ("lm", "packed")
    )
    assert packed == pytest.approx(quantized, rel=1e-3)
    comparison = recipe.json(f"{lms}/decode_{sensitivity}/fp_against_{sensitivity}_packed.json")
    assert comparison["n_utterances"] == 2
    report = (recipe.folder / lms / f"RESULTS_{sensitivity}.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("| ")]
    assert len([line for line in table if ", packed |" in line]) == 1 + (sensitivity != "uniform")
    assert "stage 13: done" in output
    again = recipe.finish("--lm_type", lm_type, "--sensitivity", sensitivity)
    assert again.count("finished before, skipped") == 13
