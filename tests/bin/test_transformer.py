"""Every command on a Transformer LM: tables, plans, packing, quantizing on real text."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from real_lms import read_sentences, train_host_lm, word_list

from espnet_mpq.bin import mpq
from espnet_mpq.packed.format import load_packed
from espnet_mpq.plan import Plan

CONF = dict(pos_enc="sinusoidal", embed_unit=13, att_unit=18, head=3, unit=25, layer=2)
OPTIONS = """
num_workers: 0
use_tensorboard: false
use_matplotlib: false
batch_type: numel
batch_bins: 400
mpq_gamma: 0.01
mpq_dual_period: 20
"""


def run(*words) -> int:
    return mpq.main(list(map(str, words)))


def ppl(lm_exp, text, folder) -> float:
    path = folder / "ppl.json"
    assert run("perplexity", lm_exp, "--text", text, "--json", path) == 0
    return json.loads(path.read_text(encoding="utf-8"))["ppl"]


def test_step_by_step(make_lm_exp, text_file, tmp_path, capsys, monkeypatch):
    """sensitivity, plan, pack, info, perplexity: the files fit each other and the budget."""
    monkeypatch.setenv("MPQ_KERNEL", "reference")
    fp = make_lm_exp(tmp_path / "fp", lm="transformer", lm_conf=CONF, n_steps=40)
    common = ["--lm_exp", fp.path, "--text", text_file, "--max_tokens", 300]
    table, plan_dir, packed = (tmp_path / n for n in ("table.json", "plan", "packed"))
    assert run("sensitivity", *common, "--bits", 1, 2, 4, 8, "--output", table) == 0
    entries = json.loads(table.read_text(encoding="utf-8"))["entries"]
    assert len(entries) == 1 + 2 * 2 + 1
    for row in entries.values():  # every cluster harms, and the more the fewer its bits
        assert row["1"]["harm"] > row["8"]["harm"] > 0
    budget = 25.5  # 18 units: biases, norms and the header weigh more than the codes
    options = ["--sensitivity", table, "--budget", budget, "--output_dir", plan_dir]
    assert run("plan", *common, *options) == 0
    settings = yaml.safe_load((plan_dir / "train_lm_mpq.yaml").read_text(encoding="utf-8"))
    assert settings["lm"] == "mpq_transformer"
    plan = Plan.from_dict(settings["lm_conf"].pop("plan"))
    assert plan == Plan.read(plan_dir / "plan.json") and settings["lm_conf"] == CONF
    words = ["pack", "--lm_exp", fp.path, "--plan", plan_dir / "plan.json"]
    assert run(*words, "--output_dir", packed) == 0
    assert 8 * (packed / "packed.safetensors").stat().st_size <= budget * 1.0 * n_weights(packed)
    capsys.readouterr()
    assert run("info", packed) == 0
    out = capsys.readouterr().out
    assert "transformer, 2 x 18, 3 heads, feed-forward 25, embedding 13, 31 tokens" in out
    assert "blocks.1.feed_forward" in out and "sinusoidal positions" in out
    config = yaml.safe_load((packed / "config.yaml").read_text(encoding="utf-8"))
    assert config["lm"] == "mpq_packed_transformer"
    change = ppl(packed, text_file, tmp_path) / ppl(fp.path, text_file, tmp_path) - 1
    predicted = math.expm1(sum(entries[c][str(s.bits)]["harm"] for c, s in plan.clusters.items()))
    assert 0 < change < 4 * predicted + 0.02


def n_weights(packed_dir) -> int:
    receipt = json.loads((packed_dir / "receipt.json").read_text(encoding="utf-8"))
    return receipt["totals"]["n_weights"]


@pytest.fixture(scope="module")
def ami(host, data_root, tmp_path_factory):
    """A word LM that the host has trained on meetings: its folder, and a text to go on with."""
    sentences = read_sentences(data_root / "ami_lm" / "train.txt.gz", 12000)
    folder = tmp_path_factory.mktemp("ami")
    conf = dict(embed_unit=24, att_unit=27, head=3, unit=51, layer=2, dropout_rate=0.0)
    quick = {"lm": "transformer", "optim_conf": {"lr": 0.005}, "max_epoch": 8, "batch_tokens": 500}
    tokens = word_list(sentences, 150)
    fp = train_host_lm(folder / "fp", sentences, sentences[:200], tokens, conf, **quick)
    text = folder / "text.txt"
    text.write_text("".join(f"{s}\n" for s in sentences[:1200]), encoding="utf-8")
    return fp, text


def test_quantize_on_real_text(ami, tmp_path, capsys):
    """With training better than plain rounding, no worse packed than quantized; it goes on."""
    fp, text = ami
    options = tmp_path / "train.yaml"
    options.write_text(OPTIONS)
    common = [fp, "--uniform", "--bits", 1, "--text", text, "--valid_text", text]
    rounded, trained = tmp_path / "ptq", tmp_path / "admm"
    plain = ["--no_train", "--rounding", "nearest"]
    assert run("quantize", *common, "--output", rounded, *plain) == 0
    words = [*common, "--output", trained, "--max_epoch", 4, "--train_config", options]
    assert run("quantize", *words) == 0
    numbers = {
        folder.name: json.loads((folder / "perplexity.json").read_text(encoding="utf-8"))
        for folder in (rounded, trained)
    }
    fp_ppl = numbers["ptq"]["fp"]["ppl"]
    assert fp_ppl == numbers["admm"]["fp"]["ppl"] < 40  # words alone: about 70
    assert fp_ppl < numbers["admm"]["packed"]["ppl"] < 0.9 * numbers["ptq"]["packed"]["ppl"]
    out = capsys.readouterr().out
    assert "blocks.1.attention" in out and "effective bits" in out

    quantized = ppl(trained / "work" / "train" / "exp", text, tmp_path)
    assert ppl(trained, text, tmp_path) == pytest.approx(quantized, rel=1e-3)
    plan = load_packed(trained / "packed.safetensors").plan
    assert {spec.bits for spec in plan.clusters.values()} == {1}
    checkpoint = trained / "work" / "train" / "exp" / "4epoch.pth"
    before = checkpoint.stat().st_mtime_ns
    assert run("quantize", *words) == 0
    assert checkpoint.stat().st_mtime_ns == before


def test_a_budget_on_real_text(ami, tmp_path):
    """The mixed plan meets the budget and is better than fewer bits for all."""
    fp, text = ami
    found = {}
    for name, words in (("mixed", ["--bits", 12]), ("two", ["--bits", 2, "--uniform"])):
        words += ["--text", text, "--sensitivity_tokens", 1500, "--no_train"]
        assert run("quantize", fp, *words, "--output", tmp_path / name) == 0
        numbers = json.loads((tmp_path / name / "perplexity.json").read_text(encoding="utf-8"))
        totals = json.loads((tmp_path / name / "receipt.json").read_text(encoding="utf-8"))
        found[name] = numbers["packed"]["ppl"], totals["totals"]["effective_bits"]
    assert found["mixed"][1] <= 12 and found["mixed"][0] < found["two"][0]
