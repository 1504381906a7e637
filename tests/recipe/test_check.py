"""The check of a recipe's options: one sentence for what would stop a later stage."""

from __future__ import annotations

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.recipe.check import main
from espnet_mpq.recipe.lm_options import LM_TYPES, MpqOptions
from espnet_mpq.recipe.option_values import CHECKS, MAY_BE_EMPTY, check_values

DEFAULTS = {
    **dict.fromkeys(MAY_BE_EMPTY, ""),
    **dict(stage="1", stop_stage="9", run="./run.sh", ngpu="0", nj="4", expdir="exp", budget="2.0"),
    **dict(inference_lm="valid.loss.ave.pth", sensitivity="kl", max_tokens="10000", seed="0"),
    **dict(quantized_lm="valid.loss.best.pth", no_train="false", train_lm="false", force="false"),
    **dict(data_feats="dump/raw", ref_text="text", score_unit="word", lm_exp="exp/lm"),
    **dict(asr_exp="exp/asr", test_sets="test_clean test_other"),
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The working folder: a recipe with an LM, a recogniser and two test sets."""
    files = {
        "run.sh": "",
        "conf/train.yaml": "max_epoch: 3\n",
        "exp/lm/config.yaml": "lm: seq_rnn\n",
        "exp/lm/valid.loss.ave.pth": "",
        "exp/asr/config.yaml": "",
        "exp/asr/valid.acc.ave.pth": "",
        "exp/asr/decode_fp/test_clean/text": "",
        "exp/asr/decode_fp/test_other/text": "",
        "dump/raw/lm_train.txt": "",
        "dump/raw/test_clean/text": "",
        "dump/raw/test_other/text": "",
        "dump/raw/org/utt2spk": "",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "run.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(cuda_cmd="run.pl", **given):
    options = {**DEFAULTS, **given}
    check_values(options, MAY_BE_EMPTY - {"budget"})
    return MpqOptions(options, cuda_cmd).check()


def test_what_follows_from_the_options(recipe):
    found = check(lm_exp="exp/lm//", test_sets=" test_other/  test_clean", expdir="./exp/")
    assert found["tag"] == "lm_2.0bit" and found["missing_lm"] == "false"
    assert (found["lm_exp"], found["expdir"]) == ("exp/lm", "./exp")
    assert found["test_sets"] == "test_other test_clean"
    texts = [found[f"lm_{name}_text"] for name in ("train", "dev", "test")]
    assert texts == ["dump/raw/lm_train.txt"] * 2 + ["dump/raw/test_other/text"]
    assert (
        check(sensitivity="hessian", budget="3", no_train="true")["tag"]
        == "lm_3bit_hessian_no_train"
    )
    uniform = check(sensitivity="uniform")
    assert (uniform["tag"], uniform["bits"]) == ("lm_uniform2bit", "2")


def test_texts_of_the_lms_configuration(recipe):
    (recipe / "train.txt").touch()
    (recipe / "exp/lm/config.yaml").write_text(
        "train_data_path_and_name_and_type:\n-   - train.txt\n    - text\n    - text\n"
        "valid_data_path_and_name_and_type:\n-   - dump/raw/test_other/text\n    - text\n"
    )
    assert check()["lm_train_text"] == "dump/raw/lm_train.txt"
    (recipe / "dump/raw/lm_train.txt").unlink()
    found = check(test_sets="", stop_stage="6")
    assert (found["lm_train_text"], found["lm_dev_text"]) == (
        "train.txt",
        "dump/raw/test_other/text",
    )
    assert found["lm_test_text"] == found["lm_dev_text"]


REFUSED = [
    (dict(lm_exp=""), "--lm_exp is needed"),
    (dict(lm_exp="exp/lm/config.yaml"), "is a file: give its folder exp/lm"),
    (dict(lm_exp="exp/lm:1"), "found ':' in 'exp/lm:1'"),
    (dict(lm_exp="exp/lm_"), "found no such folder; did you mean 'exp/lm'\\?; with --stage 1"),
    (dict(lm_exp="exp"), "found no config.yaml in it; with --stage 1 --train_lm true"),
    (dict(inference_lm="valid.los.ave.pth"), "did you mean 'valid.loss.ave.pth'"),
    (dict(inference_lm="x.pth", train_lm="true"), "no exp/lm/x.pth"),
    (dict(asr_exp="exp/as"), "there is no trained recogniser exp/as: .*did you mean 'exp/asr'"),
    (dict(asr_exp=""), "--asr_exp is needed"),
    (dict(test_sets=""), "--test_sets is needed"),
    (dict(test_sets="test_clan"), "no dump/raw/test_clan/text.*did you mean 'test_clean'"),
    (dict(test_sets="test_clean org"), "no dump/raw/org/text"),
    (dict(test_sets="test_clean test_clean/"), "--test_sets names test_clean twice"),
    (dict(test_sets="test_clean,test_other"), "--test_sets: found ','"),
    (dict(data_feats="dump/ra"), "no dump/ra/test_clean/text.*there is no test set in dump/ra"),
    (dict(ref_text="txt"), "no dump/raw/test_clean/txt"),
    (
        dict(fp_inference_tag="decode_f"),
        "no exp/asr/decode_f/test_clean/text.*did you mean 'decode_fp'",
    ),
    (dict(inference_asr_model="valid.acc.av.pth"), "did you mean 'exp/asr/valid.acc.ave.pth'"),
    (
        dict(inference_config="conf/trian.yaml"),
        "no conf/trian.yaml.*did you mean 'conf/train.yaml'",
    ),
    (dict(train_config="conf"), "--train_config: conf is a folder"),
    (dict(nas_config="run.sh/x"), "no run.sh/x"),
    (dict(lm_train_text="dump/raw/lm_trian.txt"), "did you mean 'dump/raw/lm_train.txt'"),
    (dict(lm_test_text="none"), "no none; give --lm_test_text"),
    (dict(lm_dev_text="a,b"), "--lm_dev_text: found ','"),
    (dict(sensitivity="hesian"), "--sensitivity hesian is unknown: did you mean 'hessian'"),
    (dict(sensitivity="kl hessian"), "--sensitivity kl hessian is unknown"),
    (dict(sensitivity="KL"), "--sensitivity KL is unknown"),
    (dict(bits="1 5"), "--bits 5 is unknown"),
    (dict(bits="1 2 1"), "--bits names 1 twice"),
    (dict(tying="group"), "--tying group and --group_size"),
    (dict(group_size="32"), "--tying group and --group_size"),
    (dict(tying="group", group_size="0"), "--group_size: found '0'"),
    (dict(budget="0"), "--budget: found '0'"),
    (dict(budget="nan"), "--budget: found 'nan'"),
    (dict(budget="2_0"), "--budget: found '2_0'"),
    (dict(budget="2,0"), "--budget: found '2,0'"),
    (dict(budget="1e9"), "--budget: found '1e9'"),
    (dict(nj="2.5"), "--nj: found '2.5'"),
    (dict(nj=" "), "--nj is empty"),
    (dict(tag=" "), "--tag is empty"),
    (dict(tag="a/b"), "--tag: found '/'"),
    (dict(seed=str(2**32)), "--seed: found '4294967296'; expected a whole number from 0 to"),
    (dict(quantized_lm="valid.loss.bst.pth"), "did you mean 'valid.loss.best.pth'"),
    (dict(run="./rn.sh --ngpu 1"), "no program ./rn.sh: did you mean './run.sh'"),
    (dict(expdir="-x"), "--expdir: found '-'"),
    (dict(stage="10", stop_stage="12"), "no stage is selected"),
]


@pytest.mark.parametrize("given, message", REFUSED, ids=lambda v: str(v)[5:40])
def test_refused(recipe, given, message):
    with pytest.raises(InputError, match=message):
        check(**given)


def test_what_no_selected_stage_reads_may_be_missing(recipe):
    for name in ("exp/asr/config.yaml", "run.sh", "dump/raw/lm_train.txt"):
        (recipe / name).unlink()
    check(stage="5", stop_stage="6")
    check(stage="2", stop_stage="3", sensitivity="uniform", lm_dev_text="dump/raw/test_clean/text")
    with pytest.raises(InputError, match="no training text 'dump/raw/lm_train.txt'"):
        check(stage="2", stop_stage="2")


def test_an_lm_that_the_recipe_will_train(recipe):
    found = check(lm_exp="exp/new", train_lm="true", lm_train_text="dump/raw/later.txt")
    assert found["missing_lm"] == "true" and not (recipe / "exp/new").exists()
    (recipe / "exp/lm/.mpq").mkdir()
    (recipe / "exp/lm/.mpq/unfinished").touch()
    with pytest.raises(InputError, match="the training of exp/lm did not finish"):
        check()
    assert check(train_lm="true")["missing_lm"] == "true"


def test_gpus_are_counted_where_jobs_run_on_this_machine(recipe, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for given in (dict(), dict(stage="4", stop_stage="4"), dict(sensitivity="nas", stop_stage="2")):
        with pytest.raises(InputError, match="--ngpu: found 1; .*give --ngpu 0"):
            check(ngpu="1", **given)
    check(ngpu="1", cuda_cmd="queue.pl --mem 4G")
    check(ngpu="1", stage="2", stop_stage="3")
    check(ngpu="1", stage="4", stop_stage="5", no_train="true")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check(ngpu="2")
    with pytest.raises(InputError, match="--ngpu: found 3; .*give fewer"):
        check(ngpu="3")


def test_the_smallest_budget_is_that_of_a_real_file(recipe, fp_exp, tmp_path):
    from espnet_mpq.hosts.espnet import families
    from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
    from espnet_mpq.plan import uniform_plan

    conf = fp_exp.settings["lm_conf"]
    lm = families.architecture_of("seq_rnn", conf, len(fp_exp.token_list))
    n_weights = sum(c.n_weights for c in lm.clusters()) + sum(s[0] for _, s in lm.rest())
    for choices, bits in (("", 1), ("8 2", 2)):
        folder = tmp_path / f"packed{bits}"
        pack_experiment(fp_exp.path, folder, plan=uniform_plan(lm.clusters(), bits))
        least = 8 * (folder / "packed.safetensors").stat().st_size / n_weights
        given = dict(lm_exp=str(fp_exp.path), inference_lm=fp_exp.checkpoint.name, bits=choices)
        check(budget=f"{least + 0.0001:.4f}", **given)
        with pytest.raises(InputError, match="the budget is too small for any plan"):
            check(budget=f"{least - 0.001:.4f}", **given)
        check(budget="0.1", sensitivity="uniform", **{**given, "bits": ""})
        check(budget="0.1", stage="4", **given)


def test_what_mpq_plan_would_refuse_of_the_training_options(recipe, fp_exp):
    given = dict(lm_exp=str(fp_exp.path), inference_lm=fp_exp.checkpoint.name, budget="30")
    given["train_config"] = "conf/train.yaml"
    check(**given)
    (recipe / "conf/train.yaml").write_text("max_epohc: 3\n")
    with pytest.raises(InputError, match="unknown training option 'max_epohc'.*'max_epoch'"):
        check(**given)
    check(no_train="true", **given)


def test_known_lms_are_those_of_the_host():
    families = pytest.importorskip("espnet_mpq.hosts.espnet.families")
    assert LM_TYPES == {lm: f.architecture.FAMILY for f in families.FAMILIES for lm in f.floats}


def test_shell_lines(recipe, capsys):
    main([f"{key}={value}" for key, value in DEFAULTS.items()])
    assert "tag=lm_2.0bit\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["script=./run.sh", *(f"{k}={v}" for k, v in {**DEFAULTS, "nj": "0"}.items())])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "./run.sh: error: --nj: found '0'; expected a whole number from 1 on\n"
    )


def test_options_of_the_other_recipes(recipe, capsys):
    options = dict(stage="1", ngpu="0", budget="", lm_config="conf/train.yaml", uniform_bits="2")
    main([f"{key}={value}" for key, value in options.items()])
    for given in (dict(budget="x"), dict(lm_config="conf/trian.yaml"), dict(uniform_bits="5")):
        with pytest.raises(SystemExit):
            main([f"{key}={value}" for key, value in {**options, **given}.items()])
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_every_checked_option_is_one_of_a_script():
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    scripts = [root / "espnet_mpq/recipe/mpq.sh", *root.glob("egs/*/*/run.sh")]
    text = "\n".join(script.read_text() for script in scripts)
    for name in {*CHECKS, *MAY_BE_EMPTY}:
        assert f"\n{name}=" in text, name
