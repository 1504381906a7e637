"""mpq quantize: one command from an fp LM to a packed one, with and without training."""

import json
import logging
import shutil

import pytest
import yaml

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
    common = ["--text", text_file, "--valid_text", text_file, "--sensitivity_tokens", 400]
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
    words_ptq += ["--rounding", "nearest"]  # second order alone beats four short epochs here
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
    # The folder written in another way: still the same inputs.
    assert run(f"{fp_exp.path}/", *words[1:]) == 0
    assert checkpoint.stat().st_mtime_ns == before
    # Other training options: a new run, the old one is kept aside.
    assert run(*words, "--seed", 3) == 0
    assert checkpoint.stat().st_mtime_ns != before
    (old,) = (trained / "work" / "train").glob("exp.*/4epoch.pth")
    assert old.stat().st_mtime_ns == before
    # The first options again: their run is taken up, the other one set aside, none is lost.
    assert run(*words) == 0
    assert checkpoint.stat().st_mtime_ns == before
    assert len(list((trained / "work" / "train").glob("exp.*/4epoch.pth"))) == 1


def test_another_fp_checkpoint_under_the_same_name_is_trained_anew(
    fp_exp, text_file, train_config, tmp_path
):
    import torch

    fp = tmp_path / "fp"
    shutil.copytree(fp_exp.path, fp)
    words = [fp, "--bits", 4, "--uniform", "--text", text_file, "--output", tmp_path / "out"]
    words += ["--max_epoch", 1, "--train_config", train_config]
    assert run(*words) == 0
    first = numbers(tmp_path / "out")
    state = torch.load(fp / fp_exp.checkpoint.name)
    state["lm.decoder.bias"] += torch.linspace(-1, 1, len(state["lm.decoder.bias"]))
    torch.save(state, fp / fp_exp.checkpoint.name)
    assert run(*words) == 0
    second = numbers(tmp_path / "out")
    assert second["fp"]["ppl"] > first["fp"]["ppl"] * 1.02
    assert second["packed"] != first["packed"]


def test_batches_of_the_fp_lm_do_not_starve_the_training(
    host, make_lm_exp, text_file, tmp_path, monkeypatch
):
    fp = make_lm_exp(
        tmp_path / "fp",
        n_steps=5,
        accum_grad=64,
        num_iters_per_epoch=10000,
        valid_batch_type="folded",
    )
    words = [fp.path, "--bits", 8, "--uniform", "--text", text_file, "--output", tmp_path / "out"]
    user = tmp_path / "user.yaml"
    user.write_text("{batch_type: sorted, batch_size: 7, seed: 11, num_workers: 0}\n")
    assert run(*words, "--max_epoch", 2, "--train_config", user) == 0
    config = yaml.safe_load((tmp_path / "out/work/train/exp/config.yaml").read_text())
    assert config["accum_grad"] == 1 and config["num_iters_per_epoch"] is None
    assert (config["batch_type"], config["batch_size"], config["seed"]) == ("sorted", 7, 11)
    out = torch_load(tmp_path / "out/work/train/exp/checkpoint.pth")
    # 57 sentences in 57 // 7 batches (the host spreads the rest), two epochs
    assert out["optimizers"][0]["mpq_admm"]["n_updates"] == 2 * 8


def torch_load(path):
    import torch

    try:
        return torch.load(path, weights_only=False)
    except TypeError:  # torch 1.13
        return torch.load(path)


def test_one_sentence_is_enough_without_training(fp_exp, tmp_path, capsys):
    text = tmp_path / "one.txt"
    text.write_text("the cat sees a tree\n")
    words = ["--bits", 4, "--uniform", "--text", text, "--output", tmp_path / "out"]
    assert run(fp_exp.path, *words, "--no_train") == 0
    assert "nan" not in capsys.readouterr().out.split("perplexity per token")[1]


@pytest.mark.parametrize(
    "change, words",
    [
        (["--bits", "5", "--uniform"], ("--uniform", "5", "1, 2, 3, 4 or 8")),
        (["--bits", "0.01"], ("budget", "at least")),
        (["--bits", "-1"], ("--bits", "-1")),
        (["--bits", "2", "--grid", "uniform", "--group_size", "4"], ("group_size",)),
        (["--bits", "20", "--valid_text", "nothing.txt"], ("nothing.txt",)),
        (["--bits", "20", "--lm_file", "none.pth"], ("none.pth",)),
        (["--bits", "20", "--epoch_tokens", "0"], ("epoch_tokens", "at least 1")),
        (["--bits", "20", "--seed", "-1"], ("--seed", "-1")),
        (["--bits", "20", "--ngpu", "99"], ("--ngpu", "99")),
        (["--bits", "20", "--train_config", "nope.yaml"], ("nope.yaml",)),
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
    assert not (output / "work").exists()  # said before the first measurement


def test_a_plan_that_it_did_not_write_stays(fp_exp, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    plan = out / "work" / "plan" / "plan.json"
    words = [fp_exp.path, "--bits", 4, "--uniform", "--text", text_file, "--no_train"]
    words += ["--output", out, "--sensitivity_tokens", 100]
    plan.parent.mkdir(parents=True)
    plan.write_text("{}")
    assert run(*words) == 1
    assert "a plan that mpq quantize did not write" in capsys.readouterr().err
    assert plan.read_text() == "{}" and not (out / "packed.safetensors").exists()
    plan.unlink()
    assert run(*words) == 0
    assert run(*words, "--bits", 8) == 0  # its own plan may be replaced
    assert {s.bits for s in Plan.read(plan).clusters.values()} == {8}
    value = json.loads(plan.read_text())
    value["clusters"]["output"]["bits"] = 2
    plan.write_text(json.dumps(value))
    capsys.readouterr()
    assert run(*words) == 1
    assert "changed since mpq quantize wrote it" in capsys.readouterr().err
    assert json.loads(plan.read_text()) == value


def test_what_the_host_would_split_is_refused_before_the_first_step(
    fp_exp, text_file, tmp_path, capsys
):
    words = ["--bits", 24, "--text", text_file]
    assert run(fp_exp.path, *words, "--output", tmp_path / "a,b") == 1
    error = capsys.readouterr().err
    assert "a comma, at which --train_data_path_and_name_and_type" in error and "==" not in error
    colon = tmp_path / "lm:best"
    shutil.copytree(fp_exp.path, colon)
    assert run(colon, *words, "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "a colon, at which --init_param FILE:SRC:DST" in error and "==" not in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "a,b").exists()


def test_paths_with_signs_of_shells_and_options_work(
    fp_exp, text_file, train_config, tmp_path, monkeypatch, capsys
):
    """Without and with training; relative, so that some begin with a dash."""
    monkeypatch.chdir(tmp_path)
    name = "-a b'c\"d\n(\u00e9)%{x}"
    shutil.copytree(fp_exp.path, name)
    shutil.copy(text_file, name + ".txt")
    words = ["--bits=1", "--uniform", f"--text={name}.txt", f"--train_config={train_config}"]
    words += ["--sensitivity_tokens=100", "--max_epoch=1", "--", name]
    for more in (["--no_train"], []):
        out = f"-out {len(more)}:[\u00e9]"
        assert run(*more, f"--output={out}", *words) == 0, capsys.readouterr().err
        assert (tmp_path / out / "packed.safetensors").is_file()


def test_two_processes_on_one_output(fp_exp, text_file, tmp_path, capsys, monkeypatch):
    from espnet_mpq import lock

    out = tmp_path / "out"
    with lock.locked(out):
        monkeypatch.setattr(lock, "_held", {})  # as another process sees it
        for words in (
            ["quantize", fp_exp.path, "--bits", 24, "--text", text_file, "--output", out],
            ["pack", "--lm_exp", fp_exp.path, "--output_dir", out],
            ["sensitivity", "--lm_exp", fp_exp.path, "--text", text_file, "--output", out],
        ):
            assert mpq.main([str(w) for w in words]) == 1
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1 and "another process is writing" in lines[0], lines
        monkeypatch.undo()
    assert not out.exists()
