"""mpq.sh on a recipe folder: the commands it issues, done marks, no file of the user touched."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.setup_recipe import TEMPLATE, setup_recipe
from espnet_mpq.setup_recipe import main as setup_main

sys.path.insert(0, str(Path(__file__).parent))
from fake_recipe import FakeRecipe  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
MPQ = "exp/mpq_lm_2.0bit"


@pytest.fixture
def recipe(tmp_path):
    recipe = FakeRecipe(tmp_path)
    setup_recipe(recipe.path)
    return recipe


def run(recipe, *options, ok=True):
    """Run mpq.sh with the usual options and more; returns its output."""
    return recipe.run_mpq("--train_lm", "true", *options, ok=ok)


def options_of(command):
    """{option: value} of a command line of pairs."""
    return {k: v for k, v in zip(command, command[1:]) if k.startswith("--")}


def test_whole_road(recipe):
    before = recipe.snapshot()
    output = run(recipe, "--inference_args", "--lm_weight 0.3 --ctc_weight 0.5")
    after = recipe.snapshot()
    assert {p: after[p] for p in before} == before
    new = {str(p.relative_to(recipe.path)) for p in after.keys() - before.keys()}
    allowed = (MPQ, "exp/asr/mpq_lm_2.0bit_", "exp/lm/", "exp/lm_stats/")
    assert [p for p in new if not p.startswith(allowed)] == []

    commands = recipe.take_notes()
    recipe_calls = [options_of(c) for c in commands if c[0] == "run.sh"]
    assert [c["--stage"] for c in recipe_calls] == ["6", "7", "12", "12", "12", "12"]
    assert all(c["--python"] == "./fake_python -m espnet_mpq" for c in recipe_calls)
    fp, admm, *decodings = recipe_calls
    assert (fp["--stop_stage"], fp["--lm_exp"]) == ("8", "exp/lm")
    assert admm["--lm_config"] == f"{MPQ}/plan/train_lm_mpq.yaml"
    assert admm["--lm_args"] == "--init_param exp/lm/valid.loss.ave.pth"
    assert (admm["--lm_exp"], admm["--stop_stage"]) == (f"{MPQ}/lm", "7")
    assert [(c["--inference_tag"], c["--lm_exp"], c["--test_sets"]) for c in decodings] == [
        ("mpq_lm_2.0bit_fp", "exp/lm", "test_a"),
        ("mpq_lm_2.0bit_fp", "exp/lm", "test_b"),
        ("mpq_lm_2.0bit_packed", f"{MPQ}/packed", "test_a"),
        ("mpq_lm_2.0bit_packed", f"{MPQ}/packed", "test_b"),
    ]
    assert decodings[2]["--inference_lm"] == "packed.safetensors"
    assert decodings[0]["--inference_lm"] == "valid.loss.ave.pth"
    assert decodings[3]["--inference_args"] == "--lm_weight 0.3 --ctc_weight 0.5"
    assert "--inference_config" not in decodings[0]  # the recipe's own choice stands

    jobs = [c for c in commands if c[0] in ("run.pl", "cuda.pl")]
    assert jobs[0][1:3] == ["JOB=1:2", f"{MPQ}/log/sensitivity.JOB.log"]
    assert jobs[0][-4:] == ["--job", "JOB", "--n_jobs", "2"]
    assert jobs[1][-2:] == ["--merge", "2"]
    plan = options_of(next(c for c in jobs if "plan" in c))
    assert (plan["--budget"], plan["--text"]) == ("2.0", "dump/raw/lm_train.txt")
    formats = [options_of(c).get("--text_format") for c in (*jobs[:2], jobs[2])]
    assert formats == ["kaldi"] * 3 and "plan" in jobs[2]
    pack = options_of(next(c for c in jobs if "pack" in c))
    assert pack["--lm_file"] == "valid.loss.best.pth"
    assert (pack["--fp_exp"], pack["--fp_file"]) == ("exp/lm", "valid.loss.ave.pth")
    perplexity = [options_of(c) for c in jobs if c[0] == "cuda.pl"]
    assert [c["--model_file"] for c in perplexity] == [
        "exp/lm/valid.loss.ave.pth",
        f"{MPQ}/lm/valid.loss.best.pth",
        f"{MPQ}/packed/packed.safetensors",
    ]
    assert perplexity[0]["--data_path_and_name_and_type"] == "dump/raw/test_a/text,text,text"

    results = (recipe.path / MPQ / "RESULTS.md").read_text()
    assert "## test_a" in results and "## test_b" in results and "embedding 2 bit" in results
    assert "| packed | 1.99 | 0.0000 | 12.50 | 0.00 | 0/0/0 | 1.000 |" in results
    assert "plan/pareto.png" in results
    assert "Successfully finished" in output


def test_split_training_text(recipe):
    """--num_splits_lm: the fp LM's configuration names folders of shapes and of texts."""
    splits = recipe.path / "exp" / "lm_stats" / "splits2"
    for name in ("text_shape.char", "lm_train.txt"):
        (splits / name).mkdir(parents=True)
    lm = recipe.path / "exp" / "lm"
    lm.mkdir()
    (lm / "valid.loss.ave.pth").write_text("fp")
    (lm / "config.yaml").write_text(
        "train_data_path_and_name_and_type:\n-   - exp/lm_stats/splits2/lm_train.txt\n"
        "train_shape_file:\n- exp/lm_stats/splits2/text_shape.char\n"
    )
    run(recipe, "--stop_stage", "2")
    names = stages_run(recipe)
    assert not [name for name in names if name.startswith("recipe")]
    (recipe.path / "dump" / "raw" / "lm_train.txt").unlink()
    output = run(recipe, "--stop_stage", "2", "--tag", "other", ok=False)
    assert "no training text 'dump/raw/lm_train.txt'; give --lm_train_text" in output


def stages_run(recipe):
    """Names of the steps that were run, from the noted commands."""
    names = []
    for who, *words in recipe.take_notes():
        if who == "run.sh":
            names.append(f"recipe {options_of(words)['--stage']}")
        elif who == "python" and "espnet_mpq.bin.mpq" in words:
            names.append(words[2])
    return [n for n in names if n != "info"]


def test_finished_stages_are_not_repeated(recipe):
    run(recipe)
    recipe.take_notes()
    output = run(recipe)
    assert stages_run(recipe) == []
    assert output.count("finished before, skipped") == 7  # all but the check and the report

    # Another budget in the same folder: plan and all that follows from it, not the sensitivity.
    run(recipe, "--budget", "3.0", "--tag", "lm_2.0bit", "--stop_stage", "5")
    assert stages_run(recipe) == ["plan", "recipe 7"]  # the checkpoint stayed the same: no packing

    # A new fp LM: everything again.
    (recipe.path / "exp/lm/valid.loss.ave.pth").write_text("better\n")
    run(recipe, "--stop_stage", "5")
    assert stages_run(recipe) == ["sensitivity", "sensitivity", "sensitivity", "plan", "recipe 7"]

    # One stage alone, by force.
    run(recipe, "--stage", "5", "--stop_stage", "5", "--force", "true")
    assert stages_run(recipe) == ["pack"]


def test_a_new_budget_measures_no_sensitivity_again(recipe):
    run(recipe, "--stop_stage", "2")
    recipe.take_notes()
    output = run(recipe, "--stop_stage", "3", "--budget", "3.0", "--nj", "3")
    assert stages_run(recipe) == ["plan"]
    assert f"{MPQ}/sensitivity.json was measured with the same inputs: copied" in output
    assert (recipe.path / "exp/mpq_lm_3.0bit/sensitivity.json").read_text() == "{}\n"
    for other in (["--max_tokens", "9"], ["--tying", "cluster"], ["--sensitivity", "fisher"]):
        run(recipe, "--stop_stage", "2", "--budget", "4.0", *other)
        assert stages_run(recipe) == ["sensitivity"] * 3


def test_two_runs_of_one_name_at_once(recipe):
    run(recipe, "--stop_stage", "1")
    marks = recipe.path / MPQ / "marks"
    with open(marks / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = run(recipe, ok=False)
        assert "another run is at work here, see exp/mpq_lm_2.0bit/marks; wait" in output
        run(recipe, "--stop_stage", "2", "--budget", "3.0")  # another name


def test_killed_training_goes_on_but_a_foreign_one_is_dropped(recipe):
    (recipe.path / "fail_at_7").touch()
    output = run(recipe, ok=False)
    assert "'./run.sh' failed; look at" in output and "stage 7 breaks" in output
    checkpoint = recipe.path / MPQ / "lm" / "checkpoint.pth"
    FakeRecipe.write(checkpoint, "half way")
    (recipe.path / "fail_at_7").unlink()
    recipe.take_notes()
    run(recipe, "--stop_stage", "4")
    assert stages_run(recipe) == ["recipe 7"] and checkpoint.exists()
    run(recipe, "--stop_stage", "4", "--budget", "1.5", "--tag", "lm_2.0bit")
    assert not checkpoint.exists()  # duals of another plan must not be resumed


def test_existing_fp_decoding_is_used(recipe):
    run(recipe, "--fp_inference_tag", "decode_old", "--test_sets", "test_a")
    assert stages_run(recipe).count("recipe 12") == 1
    assert (recipe.path / "exp/asr/decode_old/test_a/text").read_text() == "u1 mine\n"
    results = (recipe.path / MPQ / "RESULTS.md").read_text()
    assert "| fp | 32.00 | 0.0000 | 12.50 | 100.00 | 1/1/0 | - |" in results


def commands_of(recipe, *options):
    """Noted commands of mpq and of the recipe, up to perplexity: (name, options)."""
    run(recipe, "--stop_stage", "6", *options)
    found = []
    for who, *words in recipe.take_notes():
        if who == "run.sh":
            found.append((f"recipe {options_of(words)['--stage']}", options_of(words)))
        elif who == "python" and "espnet_mpq.bin.mpq" in words:
            found.append((words[2], options_of(words)))
    return found


def test_uniform_plans_need_no_sensitivity(recipe):
    options = ["--sensitivity", "uniform", "--bits", "4", "--tying", "cluster", "--grid", "paper"]
    commands = commands_of(recipe, *options)
    assert [name for name, _ in commands] == ["recipe 6", "plan", "recipe 7", "pack"]
    plan = commands[1][1]
    assert (plan["--uniform"], plan["--tying"], plan["--grid"]) == ("4", "cluster", "paper")
    assert "--budget" not in plan and "--sensitivity" not in plan
    assert (recipe.path / "exp/mpq_lm_uniform4bit/packed/packed.safetensors").exists()
    run(recipe, "--sensitivity", "uniform", "--stage", "9", "--bits", "4")
    results = (recipe.path / "exp/mpq_lm_uniform4bit/RESULTS.md").read_text()
    assert results.startswith("# lm_uniform4bit: exp/lm with 4 bit for every cluster\n")


def test_hessian_is_a_method_of_the_sensitivity(recipe):
    commands = commands_of(recipe, "--sensitivity", "hessian", "--lm_type", "rnn")
    assert [name for name, _ in commands[1:4]] == ["sensitivity"] * 3  # two jobs and their merge
    assert all(options["--method"] == "hessian" for _, options in commands[1:4])
    assert commands[4][1]["--sensitivity"] == "exp/mpq_lm_2.0bit_hessian/sensitivity.json"


def test_nas_trains_a_super_network(recipe):
    options = ["--sensitivity", "nas", "--bits", "1 2 8", "--tying", "cluster"]
    commands = commands_of(recipe, *options)
    assert [name for name, _ in commands] == ["recipe 6", "nas", "plan", "recipe 7", "pack"]
    nas = commands[1][1]
    assert (nas["--lm_exp"], nas["--lm_file"]) == ("exp/lm", "valid.loss.ave.pth")
    assert (nas["--text"], nas["--budget"]) == ("dump/raw/lm_train.txt", "2.0")
    assert (nas["--bits"], nas["--tying"], nas["--seed"]) == ("1", "cluster", "0")
    assert nas["--output_dir"] == "exp/mpq_lm_2.0bit_nas/nas"
    assert commands[2][1]["--sensitivity"] == "exp/mpq_lm_2.0bit_nas/nas/sensitivity.json"
    run(recipe, "--stop_stage", "6", *options)
    assert stages_run(recipe) == []
    run(recipe, "--stop_stage", "2", *options, "--budget", "3.0", "--tag", "lm_2.0bit_nas")
    assert stages_run(recipe) == ["nas"]  # the search knows the budget


def test_no_training(recipe):
    """The fp LM is packed with the plan: no recipe stage 7, no quantized LM to measure."""
    commands = commands_of(recipe, "--no_train", "true")
    assert [n for n, _ in commands] == ["recipe 6", *["sensitivity"] * 3, "plan", "pack"]
    folder = "exp/mpq_lm_2.0bit_no_train"
    pack = commands[-1][1]
    assert (pack["--lm_exp"], pack["--lm_file"]) == ("exp/lm", "valid.loss.ave.pth")
    assert (pack["--plan"], pack["--fp_exp"]) == (f"{folder}/plan/plan.json", "exp/lm")
    for words in (commands[1][1], pack):  # measured as it is stored, on the same text
        assert words["--rounding"] == "second_order"
        assert words["--text"] == "dump/raw/lm_train.txt"
    measured = sorted(p.name for p in (recipe.path / folder).glob("ppl_*"))
    assert measured == ["ppl_fp", "ppl_packed"]
    run(recipe, "--no_train", "true", "--stage", "9")
    results = (recipe.path / folder / "RESULTS.md").read_text()
    assert "without ADMM" in results and "| packed |" in results and "| quantized |" not in results
    # A new fp checkpoint is packed again.
    (recipe.path / "exp/lm/valid.loss.ave.pth").write_text("better\n")
    run(recipe, "--no_train", "true", "--stage", "5", "--stop_stage", "5")
    assert stages_run(recipe) == ["pack"]


def test_transformers_are_known_by_their_configuration(recipe):
    recipe.env["lm"] = "transformer"
    run(recipe, "--lm_type", "transformer", "--stop_stage", "1")
    output = run(recipe, "--lm_type", "rnn", "--stop_stage", "1", ok=False)
    assert "--lm_type rnn, but exp/lm/config.yaml says lm: transformer" in output
    config = recipe.path / "exp" / "lm" / "config.yaml"
    config.write_text(config.read_text().replace("lm: transformer", "lm: transformer_opt"))
    output = run(recipe, "--stop_stage", "1", ok=False)
    assert "lm: transformer_opt cannot be made low-bit" in output


def test_a_tool_that_makes_nothing_is_an_error(recipe):
    python = recipe.path / "fake_python"
    python.write_text(python.read_text().replace("echo '{}' > \"$d/plan.json\"", "true"))
    assert "(plan) did not make exp/mpq_lm_2.0bit/plan/plan.json" in run(recipe, ok=False)
    assert not (recipe.path / MPQ / "marks/plan.-.done").exists()


def test_help_lists_every_option(recipe):
    output = run(recipe, "--help")
    for option in ("--lm_exp", "--budget (2.0)", "--run", "--seed (0)", "--fp_inference_tag"):
        assert option in output


def test_setup_needs_a_recipe_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        setup_recipe(tmp_path / "absent")
    with pytest.raises(InputError, match="no path.sh, no cmd.sh"):
        setup_recipe(tmp_path)


def test_setup_keeps_a_changed_file(recipe, capsys):
    target = recipe.path / "mpq.sh"
    assert os.access(target, os.X_OK)
    assert setup_recipe(recipe.path) is False
    target.write_text("mine\n")
    with pytest.raises(InputError, match="--force"):
        setup_recipe(recipe.path)
    assert target.read_text() == "mine\n"
    with pytest.raises(SystemExit, match="differs"):
        setup_main([str(recipe.path)])
    setup_main([str(recipe.path), "--force"])
    assert target.read_bytes() == TEMPLATE.read_bytes()
    assert "written" in capsys.readouterr().out


def test_template_is_one_file():
    link = Path(__file__).resolve().parents[2] / "egs" / "TEMPLATE" / "mpq.sh"
    assert link.read_bytes() == TEMPLATE.read_bytes()


def test_template_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = map(str, sorted(TEMPLATE.parent.glob("*.sh")))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
