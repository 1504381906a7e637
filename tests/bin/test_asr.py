"""A recogniser on the road of the commands: sensitivity, plan, pack, info, quantize."""

from __future__ import annotations

import json

import pytest
import yaml
from recognisers import make_recogniser, make_speech

from espnet_mpq.bin.mpq import main
from espnet_mpq.packed.format import load_packed
from espnet_mpq.packed.size import packed_size
from espnet_mpq.plan import uniform_plan


@pytest.fixture(scope="module")
def exp(host, tmp_path_factory):
    return make_recogniser(tmp_path_factory.mktemp("asr") / "asr")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return make_speech(tmp_path_factory.mktemp("speech"))


def run(*words) -> int:
    return main([str(word) for word in words])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def budget_between(exp, low, high) -> int:
    """Bytes half way between the files of two uniform plans."""
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp

    architecture = load_fp(exp.path).architecture
    plans = [uniform_plan(architecture.clusters(), bits) for bits in (low, high)]
    return sum(packed_size(architecture, plan).n_bytes for plan in plans) // 2


@pytest.fixture
def fails(capsys):
    def check(words, *parts):
        capsys.readouterr()
        assert run(*words) == 1
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if "error:" in line]
        assert len(lines) == 1 and "internal" not in lines[0], error
        assert all(part in lines[0] for part in parts), lines[0]

    return check


def test_step_by_step(exp, speech, tmp_path, capsys):
    table, plan, out = tmp_path / "s.json", tmp_path / "plan", tmp_path / "packed"
    source = ["--asr_exp", exp.path]
    sensitivity = ["sensitivity", *source, "--data", speech, "--bits", 2, 8, "--output", table]
    assert run(*sensitivity, "--max_seconds", 1.5) == 0
    record = read(table)["provenance"]
    assert record["unit"] == read(table)["unit"] == "nats/frame"
    assert record["max_seconds"] == 1.5 and 0 < record["n_seconds"] <= 1.5
    assert record["inputs"]["data"] == {"path": str(speech), "sha256": record["data_sha256"]}
    n_clusters = len(record["clusters"])
    assert sum(map(len, read(table)["entries"].values())) == 2 * n_clusters

    budget = budget_between(exp, 2, 8)
    words = ["--sensitivity", table, "--budget_bytes", budget, "--output_dir", plan]
    assert run("plan", *source, *words) == 0
    printed = capsys.readouterr().out
    assert "KL, nats/frame" in printed and "joint KL (measured)" in printed
    assert f"mpq pack --asr_exp {exp.path}" in printed and "lm_train" not in printed
    assert not (plan / "train_lm_mpq.yaml").exists() and (plan / "pareto.png").is_file()
    front = read(plan / "pareto.json")
    assert front["unit"] == "nats/frame" and front["chosen"]["joint_kl"] > 0
    bits = {row["bits"] for row in read(plan / "plan.json")["clusters"].values()}
    assert bits == {2, 8}

    assert run("pack", *source, "--plan", plan / "plan.json", "--output_dir", out) == 0
    packed = load_packed(out / "packed.safetensors")
    assert packed.n_bytes == front["chosen"]["n_bytes"] <= budget
    assert packed.metadata["source"]["data_sha256"] == record["data_sha256"]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"] == "mpq_packed_asr" and config["encoder"] == "conformer"
    assert set(config["model_conf"]["plan"]["clusters"]) == set(record["clusters"])
    assert config["model_conf"]["ctc_weight"] == 0.3
    capsys.readouterr()
    assert run("info", out) == 0
    printed = capsys.readouterr().out
    assert "recogniser ConformerEncoder + TransformerDecoder + CTC, 31 tokens" in printed
    assert "encoder.encoders.0.self_attn.pos_bias_u" in printed and "vectors (biases" in printed
    assert "encoder.encoders.0.norm_ff.weight" not in printed


def test_goes_on_where_it_stopped_and_not_on_other_speech(exp, speech, tmp_path, capsys, fails):
    table = tmp_path / "s.json"
    words = ["sensitivity", "--asr_exp", exp.path, "--data", speech, "--output", table]
    assert run(*words, "--bits", 8, "--max_seconds", 0) == 0
    first = table.read_bytes()
    assert run(*words, "--bits", 8, "--max_seconds", 0) == 0 and table.read_bytes() == first
    assert "are there" in capsys.readouterr().err
    fails([*words, "--bits", 8, "--max_seconds", 1], "measured on other speech")


def test_jobs_share_the_entries(exp, speech, tmp_path):
    words = ["sensitivity", "--asr_exp", exp.path, "--data", speech, "--bits", 4]
    words += ["--max_seconds", 1]
    assert run(*words, "--output", tmp_path / "whole.json") == 0
    for job in (1, 2):
        options = ["--output", tmp_path / "s.json", "--job", job, "--n_jobs", 2]
        assert run(*words, *options) == 0
    assert run("sensitivity", "--output", tmp_path / "s.json", "--merge", 2) == 0
    whole, merged = read(tmp_path / "whole.json"), read(tmp_path / "s.json")
    for name, row in whole["entries"].items():
        assert merged["entries"][name]["4"]["harm"] == pytest.approx(row["4"]["harm"], rel=1e-3)


def test_fisher(exp, speech, tmp_path):
    table = tmp_path / "s.json"
    words = ["sensitivity", "--asr_exp", exp.path, "--data", speech, "--method", "fisher"]
    assert run(*words, "--max_probes", 4, "--max_seconds", 1, "--output", table) == 0
    rows = read(table)["entries"].values()
    assert all(row["1"]["harm"] > row["8"]["harm"] > 0 for row in rows)


def test_quantize_in_one_command(exp, speech, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["quantize", exp.path, "--data", speech, "--no_train", "--max_seconds", 1]
    assert run(*words, "--bits", 4, "--uniform", "--output", out) == 0
    packed = load_packed(out / "packed.safetensors")
    assert {spec.bits for spec in packed.plan.clusters.values()} == {4}
    printed = capsys.readouterr().out
    assert "joint KL (measured)" in printed and "effective bits" in printed
    # A second packed model in its place.
    assert run(*words, "--bits", 8, "--uniform", "--output", out) == 0
    assert load_packed(out / "packed.safetensors").n_bytes > packed.n_bytes


def test_text_is_for_language_models_and_data_for_recognisers(exp, speech, fp_exp, tmp_path, fails):
    table = tmp_path / "s.json"
    text = speech / "text"
    fails(
        ["sensitivity", "--asr_exp", exp.path, "--text", text, "--output", table],
        *("describes a recogniser", "expected --data"),
    )
    fails(
        ["sensitivity", "--lm_exp", fp_exp.path, "--data", speech, "--output", table],
        *("describes an LM", "expected --text"),
    )
    fails(["quantize", exp.path, "--bits", 4, "--data", speech, "--output", table], "--no_train")
    fails(
        ["quantize", exp.path, "--bits", 4, "--text", text, "--output", tmp_path / "o"],
        "expected --data",
    )
    fails(["perplexity", exp.path, "--text", text], "describes a recogniser")
    fails(
        ["plan", "--asr_exp", exp.path, "--uniform", 4, "--train_config", exp.config]
        + ["--output_dir", tmp_path / "p"],
        "--train_config is for LMs",
    )
    fails(
        ["sensitivity", "--asr_exp", exp.path, "--data", speech, "--method", "hessian"]
        + ["--output", table],
        "--method fisher",
    )
    small = ["quantize", exp.path, "--bits", 0.5, "--data", speech, "--no_train"]
    fails([*small, "--output", tmp_path / "o"], "the budget is too small for this recogniser")
