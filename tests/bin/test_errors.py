"""Wrong inputs of all kinds: one line on stderr that helps, exit status not 0, nothing lost."""

from __future__ import annotations

import json
import shutil
from datetime import date

import pytest
import yaml

from espnet_mpq.bin.mpq import main
from espnet_mpq.io import read_json


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """fails(words, *parts) runs mpq and checks status and the one line of the error."""

    def check(words, *parts, status=1):
        capsys.readouterr()
        assert main([str(w) for w in words]) == status
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if ": error: " in line]
        assert len(errors) == 1 and lines[-1] == errors[0], lines
        assert "Traceback" not in "\n".join(lines)
        for part in parts:
            assert part in errors[0], errors[0]

    return check


@pytest.fixture(scope="module")
def table(fp_exp, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("sens") / "s.json"
    words = ["sensitivity", "--lm_exp", fp_exp.path, "--text", text_file, "--output", path]
    assert main([str(w) for w in words + ["--max_tokens", 100, "--bits", 1, 8]]) == 0
    return path


@pytest.fixture
def exp_copy(fp_exp, tmp_path):
    return shutil.copytree(fp_exp.path, tmp_path / "exp")


def sensitivity(exp, text, *more):
    return ["sensitivity", "--lm_exp", exp, "--text", text, "--output", "never.json", *more]


def test_options(fails, tmp_path, fp_exp, text_file):
    fails(["sensitivity"], "--output", status=2)
    fails(["sensitivity", "--output", "x.json"], "--lm_exp is missing")
    fails(["sensitivity", "--outptu", "x", "--output", "x"], "did you mean '--output'")
    fails(sensitivity(fp_exp.path, text_file, "--bits", 5), "invalid choice: 5", status=2)
    misspelt = sensitivity(fp_exp.path, text_file, "--method", "hesian")
    fails(misspelt, "--method", "did you mean 'hessian'?", status=2)
    fails(sensitivity(fp_exp.path, text_file, "--job", 2), "--job and --n_jobs")
    fails(sensitivity(fp_exp.path, text_file, "--job", 3, "--n_jobs", 2), "job 3 of 2")
    fails(sensitivity(fp_exp.path, text_file, "--max_tokens", -1), "--max_tokens", "-1")
    fails(sensitivity(fp_exp.path, text_file, "--tying", "group"), "needs --group_size")
    fails(["quantize", fp_exp.path, "--bitz", 2], "--bitz", "did you mean '--bits'?")
    quantize = ["quantize", fp_exp.path, "--text", text_file, "--bits", 9]
    fails([*quantize, "--output", ""], "--output: found ''")
    fails([*quantize, "--output", "q", "--tying", "group"], "needs --group_size")
    fails(sensitivity(fp_exp.path, text_file, "--tying", "group", "--group_size", 0), "group_size")
    fails(["sensitivity", "--output", tmp_path / "s.json", "--merge", 2], "s.1.json", "s.2.json")
    (tmp_path / "c.yaml").write_text("lm_exq: a\n")
    fails(["plan", "--config", tmp_path / "c.yaml"], "lm_exq", "did you mean 'lm_exp'")
    fails(["sensitivty"], "did you mean 'sensitivity'", status=2)


def test_text(fails, fp_exp, tmp_path):
    text = tmp_path / "text"
    fails(sensitivity(fp_exp.path, text), str(text), "No such file")
    for content, part in (
        (b"", "an empty file"),
        (b"\n  \n\t\n", "3 lines, all empty"),
        (b"caf\xe9 ol\xe9\n", "UTF-8"),
        ("\u0416\u0416\n".encode(), "known"),
    ):
        text.write_bytes(content)
        fails(sensitivity(fp_exp.path, text), part)
    text.write_text("utt-1\nutt-2\n")
    fails(sensitivity(fp_exp.path, text, "--text_format", "kaldi"), "all empty", "--text_format")


def test_text_with_some_empty_lines_and_unknown_characters_is_measured(fp_exp, tmp_path, capsys):
    (tmp_path / "text").write_text("the cat\n\n   \na dog \u00e9\n")
    words = sensitivity(fp_exp.path, tmp_path / "text", "--bits", 8)
    words[words.index("never.json")] = tmp_path / "s.json"
    assert main([str(w) for w in words]) == 0
    error = capsys.readouterr().err
    assert "2 of 4 lines are empty" in error and "unknown" in error
    assert read_json(tmp_path / "s.json")["provenance"]["n_sentences"] == 2


def test_experiment(fails, exp_copy, text_file, tmp_path):
    fails(sensitivity(tmp_path / "none", text_file), "is not a folder")
    fails(sensitivity(tmp_path, text_file), "no config.yaml", "exp/")
    checkpoint = exp_copy / "valid.loss.best.pth"
    data = checkpoint.read_bytes()
    other = sensitivity(exp_copy, text_file, "--lm_file", "5epoch.pth")
    fails(other, "5epoch.pth", checkpoint.name)
    checkpoint.write_bytes(data[: len(data) // 2])
    fails(sensitivity(exp_copy, text_file), "valid.loss.best.pth", "cannot be read")
    checkpoint.unlink()
    fails(sensitivity(exp_copy, text_file), "no valid.loss.best.pth", "config.yaml")
    checkpoint.write_bytes(data)
    settings = yaml.safe_load((exp_copy / "config.yaml").read_text())
    for changes, part in (
        ({"lm_conf": {"unit": 24, "nlayers": 2}}, "does not fit"),
        ({"lm": "seq_rn"}, "did you mean"),
        ({"token_list": settings["token_list"][:-3]}, "does not fit"),
    ):
        (exp_copy / "config.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        fails(sensitivity(exp_copy, text_file), part)
    tokens = yaml.safe_dump({**settings, "token_list": []}).replace("token_list: []", "token_list:")
    for entry, part in (("NO", "entry 0 is False"), ("2021-13-45", "quotes"), ("=", "line")):
        config = tokens.replace("token_list:", f"token_list:\n- {entry}")
        (exp_copy / "config.yaml").write_text(config)
        fails(sensitivity(exp_copy, text_file), "config.yaml", part)
    (exp_copy / "config.yaml").write_text("lm: [")
    fails(sensitivity(exp_copy, text_file), "config.yaml", "YAML")


LM_CONF = {"unit": 16, "nlayers": 2}


@pytest.mark.parametrize(
    "change, found",
    [
        ({"lm": 3}, "malformed lm: found 3; expected the name of a class"),
        ({"model": None}, "malformed model: found None; expected the name of a class"),
        ({"model": "lm_x"}, "unknown model class: found model: lm_x; did you mean 'lm'"),
        ({"lm_conf": [1]}, "malformed lm_conf: found [1]; expected keys and values"),
        ({"lm_conf": {**LM_CONF, "layer": 2}}, "unknown key lm_conf.layer: did you mean 'nlayers'"),
        ({"lm_conf": {**LM_CONF, "unit": "16"}}, "bad unit: found '16'; expected 1 to "),
        ({"lm_conf": {**LM_CONF, "tie_weights": 1}}, "bad tie_weights: found 1; expected a bool"),
        ({"lm_conf": {**LM_CONF, "dropout_rate": "x"}}, "dropout_rate: found 'x'; expected a numb"),
        ({"lm": "mpq_packed_rnn"}, "keys of lm_conf are missing: found no plan"),
        ({"model_conf": "x"}, "malformed model_conf: found 'x'; expected keys and values"),
        ({"model_conf": {"ignore": 0}}, "unknown key model_conf.ignore: did you mean 'ignore_id'"),
        ({"optim_conf": 3}, "malformed optim_conf: found 3; expected keys and values"),
        ({"max_epoch": "x"}, "malformed max_epoch: found 'x'; expected a whole number"),
        ({"token_list": []}, "bad vocab_size: found 0"),
        ({"token_list": 3}, "no token list: found 3; expected a list of tokens"),
        ({"token_list": ["a", False]}, "token_list, entry 1 is False: found bool, not text;"),
        ({"token_list": [None, 1.0]}, "entry 0 is None (2 entries are no text): found NoneType"),
        ({"token_list": ["a", date(2021, 1, 2)]}, "entry 1 is 2021-01-02: found date, not text"),
        ({"model": "LM_Multitask"}, "multitask LMs are not supported: found model: lm_multitask"),
        ({"token_type": 3}, "malformed token_type: found 3; expected text or null"),
        ({"token_type": None}, "no token_type: expected bpe, char or word"),
        ({"token_type": "cahr"}, "the host makes no tokenizer of"),
        ({"cleaner": "x"}, "the host makes no tokenizer of"),
        ({"bpemodel": 3}, "malformed bpemodel: found 3"),
    ],
)
def test_malformed_experiments(fails, exp_copy, text_file, change, found):
    settings = yaml.safe_load((exp_copy / "config.yaml").read_text())
    (exp_copy / "config.yaml").write_text(yaml.safe_dump({**settings, **change}))
    words = ["plan", "--lm_exp", exp_copy, "--uniform", 4, "--output_dir", "p"]
    fails([*words, "--text", text_file], str(exp_copy / "config.yaml"), found)


def test_plan_options(fails, fp_exp, table, tmp_path):
    def plan(*more):
        return ["plan", "--lm_exp", fp_exp.path, "--output_dir", tmp_path / "p", *more]

    fails(plan(), "one of --budget")
    fails(plan("--budget", 2, "--uniform", 2), "one of --budget")
    fails(plan("--uniform", 5), "found 5", "1, 2, 3, 4, 8, 16, 32")
    fails(plan("--budget", 20), "--sensitivity")
    fails(plan("--budget", -1, "--sensitivity", table), "above 0")
    fails(plan("--budget", "nan", "--sensitivity", table), "above 0")
    fails(plan("--budget", 1, "--sensitivity", table), "too small", "at least")
    fails(plan("--budget", 20, "--sensitivity", tmp_path / "no.json"), "no.json")
    fails(plan("--budget", 20, "--sensitivity", table, "--grid", "paper"), "'uniform'", "'paper'")
    fails(plan("--uniform", 4, "--train_config", tmp_path / "no.yaml"), "no.yaml")
    assert not (tmp_path / "p").exists()


def test_plan_refuses_a_table_of_another_lm(fails, fp_exp, make_lm_exp, table, tmp_path):
    words = ["plan", "--sensitivity", table, "--budget", 30, "--output_dir", tmp_path / "p"]
    other = make_lm_exp(tmp_path / "other", seed=5, n_steps=1)
    fails([*words, "--lm_exp", other.path], "checkpoint_sha256", "mpq sensitivity --lm_exp")
    tokens = ["<blank>", "<unk>", "<space>", *"zyxwvutsrqponmlkjihgfedcba", "'", "<sos/eos>"]
    foreign = make_lm_exp(tmp_path / "foreign", token_list=tokens, n_steps=1)
    fails([*words, "--lm_exp", foreign.path], "token_list_sha256")


def test_plan_refuses_damaged_tables(fails, fp_exp, table, tmp_path):
    value = json.loads(table.read_text())
    path = tmp_path / "s.json"
    words = ["plan", "--lm_exp", fp_exp.path, "--sensitivity", path, "--budget", 30]
    words += ["--output_dir", tmp_path / "p"]

    def entries(change):
        changed = json.loads(json.dumps(value))
        change(changed["entries"])
        return json.dumps(changed)

    def five_bits(e):
        e["output"]["5"] = e["output"].pop("1")

    for content, parts in (
        ("{", ["not JSON"]),
        ("[]", ["not a sensitivity table"]),
        (entries(lambda e: e.update(outptu=e["output"])), ["outptu", "did you mean 'output'"]),
        (entries(lambda e: e.pop("output")), ["not complete", "output"]),
        (entries(lambda e: e["output"].pop("8")), ["not complete", "output at 8 bits"]),
        (entries(five_bits), ["row output: bits: found '5'; expected one of 1, 2, 3"]),
        (entries(lambda e: e["output"].update({"5": e["output"]["1"]})), ["bits", "found '5'"]),
        (json.dumps({**value, "unit": "nats"}), ["unit: found 'nats'; expected 'nats/token'"]),
        (json.dumps({**value, "unti": "nats"}), ["unknown key: found 'unti'", "'unit'"]),
    ):
        path.write_text(content)
        fails(words, *parts)
    assert not (tmp_path / "p").exists()


def test_packing_with_wrong_plans(fails, fp_exp, tmp_path):
    words = ["plan", "--lm_exp", fp_exp.path, "--uniform", 4, "--output_dir", tmp_path / "p"]
    assert main([str(w) for w in words]) == 0
    value = json.loads((tmp_path / "p" / "plan.json").read_text())
    path = tmp_path / "plan.json"
    pack = ["pack", "--lm_exp", fp_exp.path, "--output_dir", tmp_path / "packed", "--plan", path]
    specs = value["clusters"]
    for clusters, parts in (
        ({**specs, "output": {"bits": 5}}, ["output", "found 5", "1, 2, 3, 4, 8, 16, 32"]),
        ({**specs, "rnn.l0.x": {"bits": 4}}, ["rnn.l0.x", "did you mean"]),
        ({k: v for k, v in specs.items() if k != "embedding"}, ["embedding"]),
        ({**specs, "output": {"bits": 4, "grd": "paper"}}, ["grd", "did you mean 'grid'"]),
        ({**specs, "output": {"bits": 4, "grid": "log"}}, ["log"]),
    ):
        path.write_text(json.dumps({**value, "clusters": clusters}))
        fails(pack, *parts)
    path.write_text("{")
    fails(pack, "not JSON")
    fails(["pack", "--lm_exp", fp_exp.path, "--output_dir", tmp_path / "packed"], "plan")
    assert not (tmp_path / "packed" / "packed.safetensors").exists()


def test_outputs_that_cannot_be_written(fails, fp_exp, text_file, tmp_path):
    (tmp_path / "file").write_text("here first")
    words = sensitivity(fp_exp.path, text_file, "--bits", 8, "--max_tokens", 50)
    words[words.index("never.json")] = tmp_path / "file" / "s.json"
    fails(words, "cannot write", "s.json")
    words = ["plan", "--lm_exp", fp_exp.path, "--uniform", 4, "--output_dir", tmp_path / "file"]
    fails(words, "cannot write", "plan.json")
    assert (tmp_path / "file").read_text() == "here first"


def test_other_subcommands(fails, fp_exp, text_file, kaldi_text_file, tmp_path):
    fails(["info", tmp_path], str(tmp_path))
    fails(["perplexity", tmp_path / "none", "--text", text_file], "is not a folder")
    compare = ["compare", "--ref", kaldi_text_file, "--hyp_b", kaldi_text_file]
    fails([*compare, "--hyp_a", tmp_path / "a"], str(tmp_path / "a"))
    quantize = ["quantize", fp_exp.path, "--output", tmp_path / "q"]
    fails([*quantize, "--text", text_file, "--bits", 0], "--bits")
    fails([*quantize, "--text", tmp_path / "none", "--bits", 20], "none")
    fails(["setup_recipe", tmp_path / "none"], "none")
