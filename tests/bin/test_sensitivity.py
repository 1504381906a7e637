"""mpq sensitivity on a tiny experiment: resuming, shards, refusals; weights of the LM untouched."""

from __future__ import annotations

import json
import shutil

import pytest

from espnet_mpq.bin.mpq import main
from espnet_mpq.sensitivity.kl import KlMeter

CLUSTERS = ["embedding", *(f"rnn.l{k}.{g}" for k in (0, 1) for g in "ifgo"), "output"]


def options(exp, text, output, *more):
    words = ["sensitivity", "--lm_exp", exp.path, "--text", text, "--output", output]
    return [str(w) for w in words + ["--max_tokens", 400, *more]]


@pytest.fixture(scope="module")
def whole(fp_exp, text_file, tmp_path_factory):
    """A complete table; (path, its content)."""
    path = tmp_path_factory.mktemp("sens") / "s.json"
    assert main(options(fp_exp, text_file, path)) == 0
    return path, json.loads(path.read_text())


def test_table_is_complete_and_describes_itself(whole, fp_exp):
    _, value = whole
    assert list(value["entries"]) == CLUSTERS
    for row in value["entries"].values():
        assert list(row) == ["1", "2", "4", "8"]
        harms = [row[b]["harm"] for b in row]
        assert harms[0] > harms[2] > harms[3] > 0
        assert all(e["stderr"] > 0 and 0 < e["relative_mse"] < 1 for e in row.values())
    record = value["provenance"]
    assert record["clusters"] == CLUSTERS and record["bits"] == [1, 2, 4, 8]
    assert 300 < record["n_tokens"] <= 400 and record["seed"] == 0
    assert record["command_line"].startswith("mpq sensitivity --lm_exp")
    assert record["options"]["max_tokens"] == 400


def test_interrupted_run_goes_on_and_ends_the_same(whole, fp_exp, text_file, tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    measure = KlMeter.entry
    done = []

    def entry(self, name, spec, *rest):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(name)
        return measure(self, name, spec, *rest)

    monkeypatch.setattr(KlMeter, "entry", entry)
    assert main(options(fp_exp, text_file, path)) == 130
    partial = json.loads(path.read_text())
    assert sum(map(len, partial["entries"].values())) == 7
    done.clear()
    monkeypatch.setattr(
        KlMeter, "entry", lambda *a: done.append(a[1]) or measure(*a)
    )
    assert main(options(fp_exp, text_file, path)) == 0
    assert len(done) == 33
    assert json.loads(path.read_text())["entries"] == whole[1]["entries"]


def test_shards_merge_to_the_same_table(whole, fp_exp, text_file, tmp_path, capsys):
    path = tmp_path / "s.json"
    for job in (1, 2, 3):
        assert main(options(fp_exp, text_file, path, "--job", job, "--n_jobs", 3)) == 0
    assert not path.exists()
    assert main(["sensitivity", "--output", str(path), "--merge", "3"]) == 0
    assert json.loads(path.read_text())["entries"] == whole[1]["entries"]
    assert "40 entries" in capsys.readouterr().out


def test_another_measurement_is_refused(whole, fp_exp, text_file, tmp_path, capsys):
    path = tmp_path / "s.json"
    shutil.copy(whole[0], path)
    before = path.read_bytes()
    for change, names in (
        (["--seed", 1], ["seed 0 in ", ", 1 in this run"]),
        (["--grid", "paper"], ["'uniform' in ", ", 'paper' in this run"]),
        (["--tying", "cluster"], ["'row' in ", ", 'cluster' in this run"]),
        (["--max_tokens", 500], ["max_tokens 400 in ", ", 500 in this run"]),
        (["--printed_form"], ["'kl' in ", ", 'kl_printed' in this run"]),
    ):
        assert main(options(fp_exp, text_file, path, *change)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("mpq sensitivity: error:")
        assert all(name in error for name in names), error
    assert path.read_bytes() == before


def test_config_file_and_printed_form(fp_exp, text_file, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"lm_exp: {fp_exp.path}\ntext: {text_file}\nbits: [1]\nprinted_form: true\n")
    path = tmp_path / "s.json"
    words = ["sensitivity", "--config", str(config), "--output", str(path), "--bits", "8"]
    assert main(words) == 0
    value = json.loads(path.read_text())
    assert value["method"] == "kl_printed"
    assert [list(row) for row in value["entries"].values()] == [["8"]] * 10


CURVATURE = ["--max_tokens", 200, "--max_probes", 6, "--precision", 0]


@pytest.fixture(scope="module", params=["hessian", "fisher"])
def probed(request, fp_exp, text_file, tmp_path_factory):
    """(method, options, content of a complete table made from traces)."""
    path = tmp_path_factory.mktemp("sens") / "s.json"
    words = [*CURVATURE, "--method", request.param]
    assert main(options(fp_exp, text_file, path, *words)) == 0
    return request.param, words, json.loads(path.read_text())


def test_traces_give_a_complete_table(probed, fp_exp):
    from found import find_clusters, get_mats

    from espnet_mpq.hosts.espnet.experiment.opened import load_fp_lm
    from espnet_mpq.plan import ClusterSpec
    from espnet_mpq.quant.fake_quant import project_cluster

    method, _, value = probed
    assert value["method"] == method and list(value["entries"]) == CLUSTERS
    assert value["curvature"]["probes"] == [0, 1, 2, 3, 4, 5]
    lm = load_fp_lm(fp_exp.path).module
    for cluster in find_clusters(lm):
        row = value["curvature"]["clusters"][cluster.name]
        assert row["trace"] == pytest.approx(sum(row["samples"]) / 6)
        mats = get_mats(lm, cluster)
        for bits in (1, 8):
            values = project_cluster(mats, ClusterSpec(bits)).values
            square = sum(float((q - w).square().sum()) for q, w in zip(values, mats))
            expected = max(0.0, 0.5 * row["trace"] / cluster.n_weights * square)
            entry = value["entries"][cluster.name][str(bits)]
            assert entry["harm"] == pytest.approx(expected, rel=1e-4)
    record = value["provenance"]
    assert (record["probe"], record["trace"]) == ("rademacher", "average")


def test_killed_probing_goes_on_and_ends_the_same(probed, fp_exp, text_file, tmp_path, monkeypatch):
    from espnet_mpq.sensitivity.hessian import METERS

    method, words, value = probed
    meter, done = METERS[method], []
    sample = meter.sample

    def killed(self, probe):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(probe)
        return sample(self, probe)

    monkeypatch.setattr(meter, "sample", killed)
    path = tmp_path / "s.json"
    assert main(options(fp_exp, text_file, path, *words)) == 130
    partial = json.loads(path.read_text())
    assert partial["curvature"]["probes"] == [0, 1, 2]
    assert not partial["entries"]  # nothing that could be taken for a finished table
    monkeypatch.setattr(meter, "sample", lambda self, k: done.append(k) or sample(self, k))
    assert main(options(fp_exp, text_file, path, *words)) == 0
    assert done == [0, 1, 2, 3, 4, 5]
    again = json.loads(path.read_text())
    assert again["entries"] == value["entries"] and again["curvature"] == value["curvature"]


def test_jobs_share_probes_and_their_table_can_be_planned(probed, fp_exp, text_file, tmp_path):
    _, words, value = probed
    path = tmp_path / "s.json"
    for job in (1, 2):
        assert main(options(fp_exp, text_file, path, *words, "--job", job, "--n_jobs", 2)) == 0
    first = json.loads((tmp_path / "s.1.json").read_text())
    assert first["curvature"]["probes"] == [0, 2, 4]
    assert main(["sensitivity", "--output", str(path), "--merge", "2"]) == 0
    merged = json.loads(path.read_text())
    assert merged["curvature"] == value["curvature"] and merged["entries"] == value["entries"]
    words = ["plan", "--lm_exp", fp_exp.path, "--sensitivity", path, "--budget", 21]
    assert main([str(w) for w in [*words, "--output_dir", tmp_path / "plan"]]) == 0
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    bits = {name: str(spec["bits"]) for name, spec in plan["clusters"].items()}
    harm = sum(value["entries"][name][bits[name]]["harm"] for name in CLUSTERS)
    assert plan["provenance"]["summary"]["predicted"] == pytest.approx(harm)
    assert plan["provenance"]["summary"]["joint_kl"] > 0


def test_more_precision_adds_probes(probed, fp_exp, text_file, tmp_path, capsys):
    _, words, value = probed
    path = tmp_path / "s.json"
    rough = [*words, "--precision", 100]
    assert main(options(fp_exp, text_file, path, *rough)) == 0
    assert json.loads(path.read_text())["curvature"]["probes"] == [0, 1, 2, 3]
    assert main(options(fp_exp, text_file, path, *words)) == 0
    assert "6 probes did not reach a relative standard error of 0" in capsys.readouterr().err
    assert json.loads(path.read_text())["entries"] == value["entries"]


def test_tables_and_traces_of_another_lm_are_refused(
    whole, probed, fp_exp, text_file, tmp_path, capsys
):
    method, words, curved = probed
    path = tmp_path / "s.json"

    def renamed(value):
        return json.loads(json.dumps(value).replace("rnn.l0.i", "rnn.l7.i"))

    def extra(value):
        return {**value, "entries": {**value["entries"], "rnn.l7.i": value["entries"]["output"]}}

    def heavier(value):
        value = json.loads(json.dumps(value))
        value["curvature"]["clusters"]["output"]["squared_norm"] *= 2
        return value

    for value, more, change, message in (
        (whole[1], [], renamed, "found clusters ['rnn.l7.i'] in {}, ['rnn.l0.i'] in this run"),
        (whole[1], [], extra, "{}: unknown cluster: found 'rnn.l7.i'; did you mean 'rnn.l1.i'"),
        (curved, words, renamed, "found clusters ['rnn.l7.i'] in {}, ['rnn.l0.i'] in this run"),
        (curved, words, heavier, "traces of different LMs, {} and "),
    ):
        path.write_text(json.dumps(change(value)))
        before = path.read_bytes()
        assert main(options(fp_exp, text_file, path, *more)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert message.format(path) in error, error
        assert path.read_bytes() == before
        # As a shard beside one of this LM.
        shards = [tmp_path / f"m.{job}.json" for job in (1, 2)]
        for shard, content in zip(shards, (value, change(value))):
            shard.write_text(json.dumps(content))
        assert main(["sensitivity", "--output", str(tmp_path / "m.json"), "--merge", "2"]) == 1
        assert not (tmp_path / "m.json").exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a shard and the first one: cluster output" in error


def test_negative_traces_are_named_and_count_as_no_harm(
    fp_exp, text_file, tmp_path, monkeypatch, capsys
):
    from espnet_mpq.sensitivity.hessian import HessianMeter

    def sample(self, probe):
        values = {name: 1.0 + probe % 2 for name in CLUSTERS}
        return {**values, "rnn.l0.f": -3.0 - probe % 2, "output": -0.1 + probe % 2 - 0.5}

    monkeypatch.setattr(HessianMeter, "sample", sample)
    path = tmp_path / "s.json"
    words = ["--method", "hessian", "--max_probes", 4, "--trace", "plain", "--probe", "gaussian"]
    assert main(options(fp_exp, text_file, path, *words)) == 0
    error = capsys.readouterr().err
    assert "negative for rnn.l0.f (-3.5 +- 0.29, beyond twice its standard error), output" in error
    assert "output (-0.1 +- 0.29, within twice its standard error)" in error
    assert "--method fisher" in error
    entries = json.loads(path.read_text())["entries"]
    assert entries["rnn.l0.f"]["1"]["harm"] == entries["output"]["2"]["harm"] == 0.0
    assert entries["embedding"]["1"]["harm"] > 0
    assert main(options(fp_exp, text_file, path, *words[:4])) == 1
    assert "probe 'gaussian' in " in capsys.readouterr().err


def test_methods_and_bounds_that_do_not_fit_are_refused(fp_exp, text_file, tmp_path, capsys):
    for words, message in (
        (["--method", "fisher", "--printed_form"], "form of the KL: found --method fisher"),
        (["--max_probes", 0], "--max_probes: found 0"),
        (["--precision", -1], "--precision: found -1"),
    ):
        assert main(options(fp_exp, text_file, tmp_path / "s.json", *words)) == 1
        assert message in capsys.readouterr().err


def test_transformer_tables(make_lm_exp, text_file, tmp_path):
    conf = dict(pos_enc="sinusoidal", embed_unit=8, att_unit=8, head=2, unit=16, layer=2)
    exp = make_lm_exp(tmp_path / "lm", lm="transformer", lm_conf=conf, n_steps=20)
    for method in ("kl", "hessian", "fisher"):
        path = tmp_path / f"{method}.json"
        assert main(options(exp, text_file, path, *CURVATURE, "--method", method)) == 0
        entries = json.loads(path.read_text())["entries"]
        assert list(entries)[1] == "blocks.0.attention" and len(entries) == 6
        harms = [row["1"]["harm"] for row in entries.values()]
        assert max(harms) > 0 and (method == "hessian" or min(harms) > 0)
