"""The AMI recipe, mini profile: plans, packing, report, and text from the annotations."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from recipes import Recipe  # noqa: E402

# With the LSTM and KL of test_an4_recipe.py every LM type and every sensitivity is run once.
OPTIONS = ("--lm_type", "transformer", "--sensitivity", "hessian nas")
METHODS = ("uniform", "hessian", "nas")
LMS = "exp/mini_bpe100/transformer"


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, data_root):
    return Recipe("ami/lm1", tmp_path_factory.mktemp("ami") / "lm1", data_root)


@pytest.fixture(scope="module")
def finished(recipe):
    needs("espnet2")
    needs("sentencepiece")
    return recipe.finish(*OPTIONS)


def test_plans_fit_the_budget_and_packing_changes_nothing(recipe, finished):
    fp = recipe.json(f"{LMS}/fp/perplexity_eval.json")["word_ppl"]
    for method in METHODS:
        totals = recipe.json(f"{LMS}/{method}/packed/receipt.json")["totals"]
        file = recipe.folder / LMS / method / "packed" / "packed.safetensors"
        assert totals["n_bytes"] == file.stat().st_size
        assert totals["effective_bits"] <= 4.0
        for name in ("dev", "eval"):
            quantized, packed = (
                recipe.json(f"{LMS}/{method}/{lm}/perplexity_{name}.json")["word_ppl"]
                for lm in ("lm", "packed")
            )
            assert packed == pytest.approx(quantized, rel=1e-3)
        assert quantized != pytest.approx(fp, rel=1e-4)
    bits = {m: recipe.json(f"{LMS}/{m}/plan/plan.json")["clusters"] for m in METHODS}
    assert {spec["bits"] for spec in bits["uniform"].values()} == {2}
    assert bits["uniform"].keys() == bits["hessian"].keys() == bits["nas"].keys()
    tables = {
        "hessian": recipe.json(f"{LMS}/hessian/sensitivity.json"),
        "nas": recipe.json(f"{LMS}/nas/search/sensitivity.json"),
    }
    assert {name: table["method"] for name, table in tables.items()} == {n: n for n in tables}


def test_the_report_has_a_row_for_every_system(recipe, finished):
    report = (recipe.folder / "exp" / "mini_bpe100" / "RESULTS.md").read_text()
    rows = [line.split(" | ")[0].strip("| ") for line in report.splitlines() if "±" in line]
    assert rows == ["fp", "float", "uniform", *(f"mixed, {method}" for method in METHODS[1:])]
    assert "| cluster | weights | " + " | ".join(METHODS) + " |" in report
    name, n_weights = "blocks.0.attention", 4 * 96 * 96
    row = re.search(rf"^\| {re.escape(name)} \| {n_weights:,} \| (.*) \|$", report, re.M)
    plans = [recipe.json(f"{LMS}/{m}/plan/plan.json") for m in METHODS]
    assert row.group(1).split(" | ") == [str(plan["clusters"][name]["bits"]) for plan in plans]
    assert not (recipe.folder / "RESULTS.md").exists()  # that is for the full profile


def test_finished_stages_are_skipped_and_a_lost_input_is_named(recipe, finished):
    again = recipe.finish(*OPTIONS)
    assert again.count("finished before, skipped") == 10
    (recipe.folder / LMS / "uniform" / "plan" / "train_lm_mpq.yaml").unlink()
    lost = recipe.run(*OPTIONS, "--stage", "7", "--stop_stage", "9")
    assert lost.returncode != 0
    assert f"stage 7 needs {LMS}/uniform/plan/train_lm_mpq.yaml" in lost.stdout


def test_prepared_text(tmp_path, data_root):
    copy = Recipe("ami/lm1", tmp_path / "lm1", data_root)
    copy.finish("--stop_stage", "1")
    lines = (copy.folder / "data" / "mini" / "train" / "text").read_text().splitlines()
    assert len(lines) == 400
    assert lines[:2] == ["ami-train-000001 'kay", "ami-train-000002 okay"]
    dev = (copy.folder / "data" / "mini" / "dev" / "text").read_text().splitlines()
    assert len(dev) == 40 and all(line.startswith("ami-dev-") for line in dev)


def test_damaged_data_are_refused(tmp_path):
    (tmp_path / "data" / "ami_lm").mkdir(parents=True)
    (tmp_path / "data" / "ami_lm" / "train.txt.gz").write_bytes(b"not the text")
    result = Recipe("ami/lm1", tmp_path / "lm1", tmp_path / "data").run("--stop_stage", "1")
    assert result.returncode != 0
    assert "train.txt.gz: sha256" in result.stdout and "expected 449740b3" in result.stdout


def test_text_from_the_annotations_of_the_corpus(tmp_path):
    """A made-up meeting in the corpus' layout: ES2002a is a training, IS1008a a dev meeting."""
    needs("lhotse")
    root = tmp_path / "annotations"
    for folder in ("corpusResources", "segments", "words"):
        (root / folder).mkdir(parents=True)
    meetings = {"ES2002a": "Okay", "IS1008a": "Right", "IS1009a": "Hello"}
    speaker = '<speaker nxt_agent="A" global_name="FEE005" channel="0"/>'
    (root / "corpusResources" / "meetings.xml").write_text(
        "<meetings>"
        + "".join(f'<meeting observation="{m}">{speaker}</meeting>' for m in meetings)
        + "</meetings>"
    )
    for meeting, word in meetings.items():
        (root / "segments" / f"{meeting}.A.segments.xml").write_text(
            '<root><segment transcriber_start="0.5" transcriber_end="3.0"/></root>'
        )
        (root / "words" / f"{meeting}.A.words.xml").write_text(
            f'<root><w starttime="1.0" endtime="1.5">{word}</w>'
            '<w starttime="1.5" endtime="1.5" punc="true">,</w>'
            '<w starttime="1.5" endtime="2.0">we\'re</w></root>'
        )
    copy = Recipe("ami/lm1", tmp_path / "lm1", None)
    copy.finish("--stop_stage", "1", "--annotations", str(root), "--mini", "false")
    sets = {n: (copy.folder / "data" / n / "text").read_text() for n in ("train", "dev", "eval")}
    assert sets["train"] == "ES2002a-FEE005-0-00000 okay we're\n"
    assert [len(text.splitlines()) for text in sets.values()] == [1, 1, 1]
    assert "right we're" in sets["dev"] and "hello we're" in sets["eval"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lm_type", "gru"], "--lm_type gru is unknown: known: rnn, transformer"),
        (["--sensitivity", "kl magic"], "--sensitivity magic is unknown: known: kl, hessian, nas"),
        (["--annotations", "nowhere"], "nowhere does not exist; expected the AMI annotations"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    result = Recipe("ami/lm1", tmp_path / "lm1", None).run("--stop_stage", "1", *options)
    assert result.returncode != 0
    assert message in result.stdout
