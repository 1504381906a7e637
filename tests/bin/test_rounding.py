"""--rounding second_order: measured, planned and packed alike, better than the nearest levels."""

import json

import pytest
import torch

from espnet_mpq.bin import mpq
from espnet_mpq.bin.material import open_text
from espnet_mpq.bin.rounding import make_rounder
from espnet_mpq.packed.dequantize import dequantize
from espnet_mpq.packed.format import load_packed
from espnet_mpq.plan import Plan, uniform_plan


def run(*words) -> int:
    return mpq.main([*map(str, words)])


def uniform(fp_exp, folder, bits):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    plan = uniform_plan(load_fp_lm(fp_exp.path).architecture.clusters(), bits)
    plan.write(folder / "plan.json")
    return folder / "plan.json"


def test_packed_weights_are_those_that_were_rounded(fp_exp, text_file, tmp_path):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm

    plan = uniform(fp_exp, tmp_path, 2)
    words = ["pack", "--lm_exp", fp_exp.path, "--plan", plan, "--text", text_file, "--seed", 3]
    assert run(*words, "--rounding_tokens", 500, "--output_dir", tmp_path / "out") == 0
    exp, source = load_fp_lm(fp_exp.path), (text_file, "auto", 3)
    rounded = make_rounder(exp, "second_order", 500, source).round_all(Plan.read(plan))
    clusters = exp.architecture.clusters()
    packed = load_packed(tmp_path / "out" / "packed.safetensors")
    values = dequantize(packed.tensors.__getitem__, packed.architecture, packed.plan)
    for cluster in clusters:
        for part, mat in zip(cluster.parts, rounded.mats[cluster.name]):
            assert torch.equal(values[part.parameter][part.start : part.stop], mat)
    assert set(rounded.biases) == {"rnn.bias_ih_l0", "rnn.bias_ih_l1", "decoder.bias"}
    for name, bias in rounded.biases.items():
        assert torch.equal(values[name], bias)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    record = receipt["rounding"]["clusters"]
    assert record["output"] == {
        "output_error": rounded.errors["output"][0],
        "nearest_output_error": rounded.errors["output"][1],
    }
    # The receipt compares with the fp LM, whose weights were not those that were packed.
    assert all(0 < row["relative_error"] < 0.5 for row in receipt["clusters"])


def test_the_joint_kl_is_that_of_what_is_packed(fp_exp, text_file, tmp_path):
    """Table, plan and packed LM of one seed round with the same sentences."""
    table, folder = tmp_path / "s.json", tmp_path / "plan"
    sample = ["--text", text_file, "--max_tokens", 0, "--seed", 5]
    words = ["--lm_exp", fp_exp.path, *sample, "--bits", 1, 2, 4, "--rounding", "second_order"]
    assert run("sensitivity", *words, "--rounding_tokens", 700, "--output", table) == 0
    record = json.loads(table.read_text())["provenance"]
    assert (record["rounding"], record["rounding_tokens"]) == ("second_order", 700)
    plan = ["plan", "--lm_exp", fp_exp.path, "--sensitivity", table, "--budget", 24]
    assert run(*plan, "--output_dir", folder) == 0
    planned = json.loads((folder / "pareto.json").read_text())["chosen"]
    pack = ["pack", "--lm_exp", fp_exp.path, "--plan", folder / "plan.json", "--text", text_file]
    pack += ["--seed", 5, "--rounding_tokens", 700, "--output_dir", tmp_path / "out"]
    assert run(*pack) == 0
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.hosts.espnet.lm.judged import judged_lm
    from espnet_mpq.sensitivity.kl import KlMeter

    exp = load_fp_lm(fp_exp.path)
    clusters = exp.architecture.clusters()
    meter = KlMeter(judged_lm(exp, open_text(exp, text_file, "auto", 0, 5), 4096), exp.weights)
    packed = load_packed(tmp_path / "out" / "packed.safetensors")
    values = dequantize(packed.tensors.__getitem__, packed.architecture, packed.plan)
    mats = {c.name: [values[p.parameter][p.start : p.stop] for p in c.parts] for c in clusters}
    covered = {part.parameter for c in clusters for part in c.parts}
    biases = {name: value for name, value in values.items() if name not in covered}
    kl, _ = meter.measure(mats, biases)
    assert kl == pytest.approx(planned["joint_kl"], rel=1e-4)

    assert run(*plan, "--rounding", "nearest", "--output_dir", folder) == 1


def test_quantize_without_training_rounds_by_second_order(fp_exp, text_file, tmp_path):
    words = ["quantize", fp_exp.path, "--bits", 1, "--uniform", "--no_train", "--text", text_file]
    assert run(*words, "--output", tmp_path / "ours") == 0
    assert run(*words, "--output", tmp_path / "nearest", "--rounding", "nearest") == 0
    ours, nearest = (
        json.loads((tmp_path / name / "perplexity.json").read_text())
        for name in ("ours", "nearest")
    )
    loss = [x["packed"]["ppl"] / x["fp"]["ppl"] for x in (ours, nearest)]
    assert loss[0] - 1 < 0.6 * (loss[1] - 1)
    first = (tmp_path / "ours" / "packed.safetensors").read_bytes()
    assert run(*words, "--output", tmp_path / "ours") == 0
    assert (tmp_path / "ours" / "packed.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    "more, message",
    [
        (["--rounding", "second_order"], "needs --plan"),
        (["--plan", "plan.json", "--rounding", "second_order"], "needs --text"),
        (["--plan", "plan.json", "--text", "t", "--rounding_tokens", -1], "--rounding_tokens"),
    ],
)
def test_what_second_order_rounding_needs_is_said(fp_exp, tmp_path, capsys, more, message):
    assert run("pack", "--lm_exp", fp_exp.path, "--output_dir", tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err


def test_curvature_knows_no_second_order_rounding(fp_exp, text_file, tmp_path, capsys):
    words = ["--lm_exp", fp_exp.path, "--text", text_file, "--output", tmp_path / "s.json"]
    assert run("sensitivity", *words, "--method", "fisher", "--rounding", "second_order") == 1
    assert "--method kl" in capsys.readouterr().err
