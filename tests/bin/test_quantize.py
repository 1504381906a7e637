"""mpq quantize: one command from an fp LM to a packed one, with and without training."""

import json
import logging

import pytest

from espnet_mpq.bin import mpq
from espnet_mpq.plan import Plan


@pytest.fixture
def train_config(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("{num_workers: 0, use_tensorboard: false, use_matplotlib: false}\n")
    return path


def run(*words) -> int:
    return mpq.main(["quantize", *map(str, words)])


def numbers(folder):
    return json.loads((folder / "perplexity.json").read_text())


def test_training_beats_rounding_and_goes_on_where_it_stopped(
    fp_exp, text_file, train_config, tmp_path, capsys
):
    rounded, trained = tmp_path / "ptq", tmp_path / "admm"
    common = ["--text", text_file, "--sensitivity_tokens", 400]
    # 16 units: scales, biases and the header weigh far more than the codes.
    assert run(fp_exp.path, "--bits", 24, *common, "--output", rounded, "--no_train") == 0
    assert not (rounded / "work" / "train").exists()
    words = [fp_exp.path, "--bits", 1, "--uniform", *common, "--output", trained]
    words += ["--max_epoch", 4, "--train_config", train_config]
    level = logging.getLogger().level
    assert run(*words) == 0
    assert logging.getLogger().level == level
    assert {s.bits for s in Plan.read(trained / "work/plan/plan.json").clusters.values()} == {1}
    assert not (trained / "work" / "sensitivity.json").exists()
    assert "effective bits" in capsys.readouterr().out

    one_bit = tmp_path / "ptq1"
    words_ptq = [fp_exp.path, "--bits", 1, "--uniform", *common, "--no_train"]
    assert run(*words_ptq, "--output", one_bit) == 0
    assert numbers(one_bit)["fp"] == numbers(trained)["fp"] == numbers(rounded)["fp"]
    assert numbers(trained)["packed"]["ppl"] < numbers(one_bit)["packed"]["ppl"]
    receipt = json.loads((rounded / "receipt.json").read_text())["totals"]
    assert receipt["n_bytes"] == (rounded / "packed.safetensors").stat().st_size
    assert receipt["effective_bits"] <= 24

    # Again: the trained model is taken up, not trained anew.
    checkpoint = trained / "work" / "train" / "exp" / "4epoch.pth"
    assert checkpoint.is_file()
    before, first = checkpoint.stat().st_mtime_ns, (trained / "packed.safetensors").read_bytes()
    assert run(*words) == 0
    assert checkpoint.stat().st_mtime_ns == before
    assert (trained / "packed.safetensors").read_bytes() == first
    # Other training options: a new run.
    assert run(*words, "--seed", 3) == 0
    assert checkpoint.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    "change, words",
    [
        (["--bits", "3", "--uniform"], ("--uniform", "3", "1, 2, 4 or 8")),
        (["--bits", "0.01"], ("budget", "at least")),
        (["--bits", "-1"], ("--bits", "-1")),
        (["--bits", "2", "--grid", "uniform", "--group_size", "4"], ("group_size",)),
        (["--bits", "20", "--valid_text", "nothing.txt"], ("nothing.txt",)),
        (["--bits", "20", "--lm_file", "none.pth"], ("none.pth",)),
        (["--bits", "20", "--epoch_tokens", "0"], ("epoch_tokens", "at least 1")),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_packed_lm(
    fp_exp, text_file, tmp_path, capsys, change, words
):
    output = tmp_path / "out"
    common = ["--text", text_file, "--sensitivity_tokens", 200, "--output", output]
    assert run(fp_exp.path, *change, *common, "--no_train") == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("mpq quantize: error")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (output / "packed.safetensors").exists()
