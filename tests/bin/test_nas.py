"""mpq nas: from an fp LM to a table of probabilities that mpq plan takes, and it goes on."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from espnet_mpq.bin import mpq
from espnet_mpq.plan import Plan
from espnet_mpq.sensitivity.table import SensitivityTable

# 16 units: scales, biases and the header weigh far more than the codes.
BUDGET = 24.0
FAST = ["--weights_epochs", 1, "--nas_epochs", 4, "--nas_updates", 10, "--lr", 0.3]


@pytest.fixture
def train_config(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("{num_workers: 0, use_tensorboard: false, use_matplotlib: false}\n")
    return path


def run(*words) -> int:
    return mpq.main(["nas", *map(str, words)])


def size_of(exp, choice):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.packed.size import packed_size
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.planning.storage import Storage

    architecture = load_fp_lm(exp.path).architecture
    return packed_size(architecture, Planner(architecture, Storage()).plan(choice)).n_bytes


def test_pipelined_search_gives_a_plan_and_is_taken_up(
    fp_exp, text_file, train_config, tmp_path, capsys
):
    out = tmp_path / "nas"
    words = ["--lm_exp", fp_exp.path, "--text", text_file, "--output_dir", out, *FAST]
    words += ["--train_config", train_config, "--budget", BUDGET]
    assert run(*words, "--config_only") == 0
    assert not (out / "sensitivity.json").exists() and not (out / "weights").exists()
    parts = {p.stem: p.read_text().splitlines() for p in (out / "text").iterdir()}
    assert {k: len(v) for k, v in parts.items()} == {"weights": 55, "heldout": 2, "valid": 3}
    assert len({line for part in parts.values() for line in part}) == 60  # no sentence twice
    names = ("train_lm_nas_weights.yaml", "train_lm_nas.yaml")
    phases = [yaml.safe_load((out / name).read_text()) for name in names]
    assert [p["lm_conf"]["nas"]["phase"] for p in phases] == ["weights", "architecture"]
    assert phases[1]["lm_conf"]["dropout_rate"] == 0.0 and phases[1]["num_iters_per_epoch"] == 10

    assert run(*words) == 0
    said = capsys.readouterr().out
    table = SensitivityTable.read(out / "sensitivity.json")
    found = table.provenance["nas"]
    assert table.method == "nas" and found["fits_budget"] and "by itself" in said
    assert found["one_best_n_bytes"] == size_of(fp_exp, found["one_best"])
    assert found["one_best_n_bytes"] <= found["budget_n_bytes"]
    for name, row in table.entries.items():
        assert sum(math.exp(-e.harm) for e in row.values()) == pytest.approx(1.0)
        assert min(row, key=lambda b: row[b].harm) == found["one_best"][name]

    # mpq plan takes the one-best plan, as it fits.
    plan = ["plan", "--lm_exp", fp_exp.path, "--sensitivity", out / "sensitivity.json"]
    plan += ["--budget", BUDGET, "--output_dir", tmp_path / "plan"]
    assert mpq.main([*map(str, plan)]) == 0
    said = capsys.readouterr().out
    assert "harm (nas), nats" in said and "joint KL (measured)" in said and "x the sum" not in said
    chosen = Plan.read(tmp_path / "plan" / "plan.json").clusters
    assert {name: spec.bits for name, spec in chosen.items()} == found["one_best"]

    # Again, and from the experiment alone: nothing is trained anew.
    checkpoint = out / "architecture" / "exp" / "checkpoint.pth"
    before, entries = checkpoint.stat().st_mtime_ns, table.to_dict()["entries"]
    assert run(*words) == 0
    assert checkpoint.stat().st_mtime_ns == before
    read = ["--lm_exp", fp_exp.path, "--text", text_file, "--output_dir", tmp_path / "read"]
    assert run(*read, "--nas_exp", out / "architecture" / "exp") == 0
    for folder in (out, tmp_path / "read"):
        assert json.loads((folder / "sensitivity.json").read_text())["entries"] == entries

    # Another budget and other steps: the first phase serves again.
    first = (out / "weights" / "exp" / "checkpoint.pth").stat().st_mtime_ns
    more = ["--budget", BUDGET + 2, "--lr", 0.1, "--nas_epochs", 2, "--nas_updates", 1]
    assert run(*words, *more) == 0
    assert (out / "weights" / "exp" / "checkpoint.pth").stat().st_mtime_ns == first
    (old,) = (out / "architecture").glob("exp.*")
    assert (old / "checkpoint.pth").stat().st_mtime_ns == before

    # A table of another method stays.
    table = json.loads((out / "sensitivity.json").read_text())
    (tmp_path / "kl").mkdir()
    kept = tmp_path / "kl" / "sensitivity.json"
    kept.write_text(json.dumps({**table, "method": "kl", "unit": "nats/token"}))
    before = kept.read_bytes()
    assert run(*read[:-1], kept.parent, "--nas_exp", out / "architecture" / "exp") == 1
    assert kept.read_bytes() == before


def test_joint_search_with_the_printed_penalty(fp_exp, text_file, train_config, tmp_path, capsys):
    common = ["--lm_exp", fp_exp.path, "--text", text_file, "--train_config", train_config]
    common += ["--mode", "joint", "--nas_epochs", 3, "--lr", 0.3, "--bits", 1, 8]
    common += ["--penalty", "paper", "--budget", BUDGET]
    chosen = {}
    for beta in (0.0, 5.0):
        out = tmp_path / str(beta)
        assert run(*common, "--beta", beta, "--output_dir", out) == 0
        chosen[beta] = SensitivityTable.read(out / "sensitivity.json").provenance["nas"]["one_best"]
        config = yaml.safe_load((out / "joint" / "exp" / "config.yaml").read_text())
        assert config["lm_conf"]["nas"]["phase"] == "joint"
    assert set(chosen[5.0].values()) == {1}  # the penalty outweighs any loss
    assert sum(chosen[0.0].values()) > sum(chosen[5.0].values())


@pytest.mark.parametrize(
    "change, words",
    [
        (["--budget", "0.01"], ("budget is too small", "at least")),
        ([], ("--budget",)),
        (["--budget", "20", "--budget_bytes", "9"], ("one of --budget",)),
        (["--budget", "20", "--nas_epochs", "1"], ("--nas_epochs", "at least 2")),
        (["--budget", "20", "--bits", "4"], ("nas.bits", "two or more")),
        (["--budget", "20", "--final_temperature", "2"], ("nas.final_temperature",)),
        (["--budget", "20", "--text", "nothing.txt"], ("nothing.txt",)),
        (["--nas_exp", "FP"], ("no search of bits", "mpq_nas_seq_rnn")),
        (["--nas_exp", "FP", "--budget", "2"], ("--nas_exp has the budget",)),
        (["--nas_exp", "FP", "--text", "nothing.txt"], ("nothing.txt",)),
        (["--budget", "1e308"], ("--budget", "at most 64")),
        (["--budget", "20", "--ngpu", "-1"], ("--ngpu", "on this machine")),
        (["--budget", "20", "--output_dir", "FP"], ("is the input",)),
    ],
)
def test_wrong_input_is_one_line(fp_exp, text_file, tmp_path, capsys, change, words):
    change = [str(fp_exp.path) if word == "FP" else word for word in change]
    common = ["--lm_exp", fp_exp.path, "--text", text_file, "--output_dir", tmp_path / "out"]
    assert run(*common, *change) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("mpq nas: error")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "out" / "weights").exists()
