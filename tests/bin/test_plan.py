"""mpq plan on a tiny experiment: the exact optimum, files, sizes, joint KL, the training config."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import yaml

from espnet_mpq.bin.mpq import main
from espnet_mpq.errors import InputError
from espnet_mpq.io import sha256_file, token_list_sha256
from espnet_mpq.packed.size import packed_size
from espnet_mpq.plan import Plan


@pytest.fixture(scope="module")
def table(fp_exp, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("sens") / "s.json"
    words = ["sensitivity", "--lm_exp", fp_exp.path, "--text", text_file, "--output", path]
    assert main([str(w) for w in words + ["--max_tokens", 400]]) == 0
    return path


def plan_words(exp, table, folder, *more):
    words = ["plan", "--lm_exp", exp.path, "--sensitivity", table, "--output_dir", folder, *more]
    return [str(w) for w in words]


# The tiny LM's header alone is about 16 bits per weight.
BUDGET = 21.0


@pytest.fixture(scope="module")
def planned(fp_exp, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "p"
    words = plan_words(fp_exp, table, folder, "--budget", BUDGET, "--repair", 0)
    assert main(words) == 0
    return folder


def test_plan_is_the_optimum_of_the_table(planned, table, fp_exp):
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.planning.storage import Storage
    from espnet_mpq.sensitivity.table import SensitivityTable

    architecture = load_fp_lm(fp_exp.path).architecture
    planner = Planner(architecture, Storage(), SensitivityTable.read(table))
    plan = Plan.read(planned / "plan.json")
    size = packed_size(architecture, plan)
    budget = int(BUDGET * size.n_weights / 8)
    choice = {name: spec.bits for name, spec in plan.clusters.items()}
    assert size.n_bytes <= budget
    n_bytes, harm = planner.n_bytes, planner.harm
    free = budget - size.fixed_n_bytes
    best = planner.predicted(plan)
    names = list(choice)
    # Every plan that differs in up to three clusters and fits is no better.
    for three in itertools.combinations(names, 3):
        for bits in itertools.product((1, 2, 4, 8), repeat=3):
            other = {**choice, **dict(zip(three, bits))}
            if sum(n_bytes[n][b] for n, b in other.items()) <= free:
                assert sum(harm[n][b] for n, b in other.items()) >= best - 1e-12
    record = plan.provenance
    assert record["inputs"]["sensitivity"]["path"] == str(table)
    assert record["options"]["budget"] == BUDGET
    assert record["summary"]["joint_kl"] > 0
    assert plan.source() == {
        "checkpoint_sha256": sha256_file(fp_exp.checkpoint),
        "token_list_sha256": token_list_sha256(fp_exp.token_list),
        "text_sha256": planner.table.provenance["text_sha256"],
        "sensitivity_sha256": sha256_file(table),
        "seed": planner.table.provenance["seed"],
    }


@pytest.mark.parametrize("tying", ["row", "model"])
def test_allocation_is_the_brute_force_optimum_over_true_file_sizes(make_lm_exp, tmp_path, tying):
    """16 bits shorten the header by a tensor per cluster, which a few clusters feel."""
    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.planning.planner import Planner
    from espnet_mpq.planning.storage import Storage
    from espnet_mpq.sensitivity.table import Entry, SensitivityTable

    conf = {"unit": 4, "nlayers": 1, "rnn_type": "gru", "tie_weights": True}
    exp = load_fp_lm(make_lm_exp(tmp_path / "lm", lm_conf=conf, n_steps=1).path)
    names, all_bits = list(exp.weights.clusters), (1, 2, 4, 8, 16)
    draw = random.Random(3)
    table = SensitivityTable({}, "kl")
    for name in names:
        for bits in all_bits:  # neither convex nor quite falling
            table.add(name, bits, Entry(draw.random() / bits, 0.0, 0.0))
    planner = Planner(exp.architecture, Storage(tying=tying), table)
    sizes, harms = {}, {}
    n_bytes, fixed = planner.least_n_bytes()
    for bits in itertools.product(all_bits, repeat=len(names)):
        choice = dict(zip(names, bits))
        plan = planner.plan(choice)
        sizes[bits] = packed_size(exp.architecture, plan).n_bytes
        harms[bits] = planner.predicted(plan)
        assert fixed + sum(n_bytes[n][b] for n, b in choice.items()) <= sizes[bits]
    for budget in range(min(sizes.values()), max(sizes.values()) + 16, 13):
        plan = planner.allocate(budget)
        best = min(harm for bits, harm in harms.items() if sizes[bits] <= budget)
        assert packed_size(exp.architecture, plan).n_bytes <= budget
        assert planner.predicted(plan) == pytest.approx(best, abs=1e-12)
    with pytest.raises(InputError, match=f"at least {min(sizes.values())} bytes"):
        planner.allocate(min(sizes.values()) - 1)


def test_predicted_size_is_the_size_on_disk(planned, fp_exp, tmp_path):
    words = ["pack", "--lm_exp", fp_exp.path, "--plan", planned / "plan.json"]
    assert main([str(w) for w in words + ["--output_dir", tmp_path / "packed"]]) == 0
    summary = Plan.read(planned / "plan.json").provenance["summary"]
    on_disk = (tmp_path / "packed" / "packed.safetensors").stat().st_size
    assert summary["n_bytes"] == on_disk
    assert summary["effective_bits"] == 8 * on_disk / summary["n_weights"] <= BUDGET


def test_front_holds_the_plan(planned):
    value = json.loads((planned / "pareto.json").read_text())
    points = value["points"]
    sizes = [p["n_bytes"] for p in points]
    harms = [p["harm"] for p in points]
    assert sizes == sorted(set(sizes)) and harms == sorted(set(harms), reverse=True)
    assert points[0]["bits"] == [1] * 10
    chosen = value["chosen"]
    assert any(
        p["bits"] == chosen["bits"] and p["n_bytes"] == chosen["n_bytes"] for p in points
    )
    assert chosen["joint_kl_stderr"] > 0


def test_train_config_is_one_that_the_host_takes(planned, host, fp_exp, capsys):
    text = (planned / "train_lm_mpq.yaml").read_text()
    settings = yaml.safe_load(text)
    plan = Plan.read(planned / "plan.json")
    assert settings["lm"] == "mpq_seq_rnn" and settings["model"] == "mpq_lm"
    assert Plan.from_dict(settings["lm_conf"]["plan"]) == plan
    assert settings["lm_conf"]["unit"] == 16
    assert settings["keep_nbest_models"] == 1
    assert settings["best_model_criterion"] == [["valid", "loss", "min"]]
    assert settings["token_type"] == "char" and settings["num_workers"] == 0
    assert settings["optim_conf"]["lr"] == pytest.approx(0.5 * fp_exp.settings["optim_conf"]["lr"])
    assert "# ADMM" in text and "mpq_gamma" in settings and "token_list" not in settings
    parser = host.LMTask.get_parser()
    args = parser.parse_args(
        ["--config", str(planned / "train_lm_mpq.yaml"), "--output_dir", "x", "--token_list", "y"]
    )
    args.token_list = fp_exp.token_list
    model = host.LMTask.build_model(args)
    assert model.lm.plan == plan
    options = host.LMTask.trainer.build_options(args)
    assert options.admm().finish_epochs < settings["max_epoch"]


def test_user_options_win_and_bad_ones_are_refused(fp_exp, tmp_path, capsys):
    def run(text):
        (tmp_path / "t.yaml").write_text(text)
        words = ["plan", "--lm_exp", fp_exp.path, "--uniform", 4, "--output_dir", tmp_path / "p"]
        return main([str(w) for w in words + ["--train_config", tmp_path / "t.yaml"]])

    text = "optim: sgd\noptim_conf: {lr: 0.1}\nmpq_gamma: 0.5\nlm_conf: {dropout_rate: 0.3}\n"
    assert run(text) == 0
    settings = yaml.safe_load((tmp_path / "p" / "train_lm_mpq.yaml").read_text())
    assert settings["optim_conf"] == {"lr": 0.1} and settings["optim"] == "sgd"
    assert settings["mpq_gamma"] == 0.5
    assert settings["lm_conf"]["dropout_rate"] == 0.3 and settings["lm_conf"]["unit"] == 16
    capsys.readouterr()
    for text, message in (
        ("mpq_gama: 1", "did you mean 'mpq_gamma'"),
        ("lm_conf: {unit: 32}", "lm_conf.unit: found 32; expected 16"),
        ("lm_conf: {plan: {}}", "plan of their own"),
        ("lm: transformer", "transformer"),
    ):
        assert run(text) == 1
        assert message in capsys.readouterr().err


def test_uniform_and_bytes(fp_exp, table, text_file, tmp_path, capsys):
    words = ["plan", "--lm_exp", fp_exp.path, "--uniform", 2, "--tying", "group"]
    words += ["--group_size", 8, "--grid", "paper", "--output_dir", tmp_path / "u"]
    assert main([str(w) for w in words + ["--text", text_file]]) == 0
    plan = Plan.read(tmp_path / "u" / "plan.json")
    assert {(s.bits, s.grid, s.tying, s.group_size) for s in plan.clusters.values()} == {
        (2, "paper", "group", 8)
    }
    out = capsys.readouterr().out
    assert "joint KL (measured)" in out and "predicted" not in out
    assert not (tmp_path / "u" / "pareto.json").exists()

    n_bytes = plan.provenance["summary"]["n_bytes"]
    assert main(plan_words(fp_exp, table, tmp_path / "b", "--budget_bytes", n_bytes)) == 0
    out = capsys.readouterr().out
    assert "rnn.l1.o" in out and "+-" in out and "x the sum" in out
    assert "smaller than fp" in out and "effective bits" in out
    assert Plan.read(tmp_path / "b" / "plan.json").provenance["summary"]["n_bytes"] <= n_bytes


def test_smallest_budget_is_named_and_works(fp_exp, table, tmp_path, capsys):
    assert main(plan_words(fp_exp, table, tmp_path / "x", "--budget", "2")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    smallest = int(error.split("at least ")[1].split()[0])
    assert not (tmp_path / "x").exists()
    assert main(plan_words(fp_exp, table, tmp_path / "x", "--budget_bytes", smallest)) == 0
    plan = Plan.read(tmp_path / "x" / "plan.json")
    assert {s.bits for s in plan.clusters.values()} == {1}
    assert main(plan_words(fp_exp, table, tmp_path / "y", "--budget_bytes", smallest - 1)) == 1


def test_joint_kl_needs_the_text_of_the_table_or_another(fp_exp, table, tmp_path, capsys):
    value = json.loads(table.read_text())
    value["provenance"]["inputs"]["text"]["path"] = str(tmp_path / "gone.txt")
    moved = tmp_path / "s.json"
    moved.write_text(json.dumps(value))
    assert main(plan_words(fp_exp, moved, tmp_path / "x", "--budget", BUDGET)) == 0
    assert "not measured" in capsys.readouterr().out


def test_refining_is_never_worse_than_the_sums_or_uniform_bits(fp_exp, table, tmp_path, capsys):
    def summary(folder, *more):
        assert main(plan_words(fp_exp, table, folder, "--budget", BUDGET, *more)) == 0
        return Plan.read(folder / "plan.json").provenance["summary"]

    before = summary(tmp_path / "a", "--repair", 0)
    assert before["allocated_joint_kl"] is None
    assert "at most of the same" not in capsys.readouterr().out
    after = summary(tmp_path / "b", "--repair", 20)
    assert after["allocated_joint_kl"] == before["joint_kl"]
    assert after["joint_kl"] <= min(before["joint_kl"], after["uniform_joint_kl"])
    assert after["effective_bits"] <= BUDGET
    said = f"of {after['uniform_bits']} bits everywhere {after['uniform_joint_kl']:.3e}"
    assert said in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "b" / "train_lm_mpq.yaml").read_text())
    bits = {n: c["bits"] for n, c in settings["lm_conf"]["plan"]["clusters"].items()}
    plan = Plan.read(tmp_path / "b" / "plan.json")
    assert bits == {name: spec.bits for name, spec in plan.clusters.items()}


def test_uniform_bits_win_where_the_sums_mislead(fp_exp, table, tmp_path):
    """A table that calls the embedding's lowest bits harmless: the measured plan is not fooled."""
    value = json.loads(table.read_text())
    for row in value["entries"].values():
        for bits, entry in row.items():
            entry["harm"] = 1e-9 * int(bits)  # the fewer bits the better
    misleading = tmp_path / "s.json"
    misleading.write_text(json.dumps(value))
    words = ["--budget", BUDGET, "--repair", 1]
    assert main(plan_words(fp_exp, misleading, tmp_path / "p", *words)) == 0
    found = Plan.read(tmp_path / "p" / "plan.json").provenance["summary"]
    assert found["allocated_joint_kl"] > 2 * found["uniform_joint_kl"] >= 2 * found["joint_kl"]

