"""Options of mpq.sh: whatever is wrong is said in one sentence before the first stage."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from espnet_mpq.setup_recipe import setup_recipe

sys.path.insert(0, str(Path(__file__).parent))
from fake_recipe import FakeRecipe  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def recipe(tmp_path):
    recipe = FakeRecipe(tmp_path)
    setup_recipe(recipe.path)
    recipe.make_lm("exp/lm")
    return recipe


REFUSED = [
    (["--lm_exp", "exp/lmm"], "no trained LM exp/lmm: .*did you mean 'exp/lm'"),
    (["--lm-exp=exp/lmm"], "no trained LM exp/lmm: .*did you mean 'exp/lm'"),
    (["--lm_exp", "exp/lm", "--lm_exp", "exp/typo"], "no trained LM exp/typo: .*--train_lm true"),
    (["--lm_exp", "exp/typo", "--stage", "4"], "no trained LM exp/typo: .*--train_lm true"),
    (["--bugdet", "2"], "unknown option --bugdet; did you mean '--budget'"),
    (["--test-set=test_a"], "unknown option --test-set; did you mean '--test_sets'"),
    (["--interface", "2"], "unknown option --interface"),
    (["--PATH", "x"], "unknown option --PATH"),
    (["--help_message", "x"], "unknown option --help_message"),
    (["extra"], "unexpected argument 'extra'"),
    (["--budget"], "option --budget needs a value"),
    (["--budget", "--nj", "3"], "option --budget needs a value, found the option --nj"),
    (["--budget", ""], "--budget is empty"),
    (["--budget="], "--budget is empty"),
    (["--budget", "abc"], "--budget: found 'abc'; expected a number of effective bits"),
    (["--budget", "2.0", "--budget", "-1"], "--budget: found '-1'"),
    (["--nj", "-1"], "--nj: found '-1'; expected a whole number from 1 on"),
    (["--no_train", "yes"], "--no_train takes true or false, found 'yes'"),
    (["--python", "false"], "cannot import espnet_mpq"),
    (["--python=false"], "cannot import espnet_mpq"),
    (["--lm_exp", "exp/my lm"], "--lm_exp: found a space in 'exp/my lm'"),
    (["--stage", "6", "--stop_stage", "3"], "no stage is selected: found --stage 6 --stop_stage 3"),
    (["--stage", "one"], "--stage: found 'one'"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda o: " ".join(o)[:30])
def test_refused_before_the_first_stage(recipe, options, message):
    before = recipe.snapshot()
    output = recipe.run_mpq(*options, ok=False)
    assert re.search(message, output)
    assert len(output.splitlines()) == 1 + ("Traceback" in output)
    assert recipe.snapshot() == before
    assert [note for note in recipe.take_notes() if note[0] != "python"] == []


def test_an_lm_is_trained_only_where_that_is_asked_for(recipe):
    shutil.rmtree(recipe.path / "exp" / "lm")
    assert "--train_lm true" in recipe.run_mpq("--stop_stage", "1", ok=False)
    assert not (recipe.path / "exp" / "lm").exists()
    (recipe.path / "fail_at_6").touch()
    assert "fp_lm.log" in recipe.run_mpq("--stop_stage", "1", "--train_lm", "true", ok=False)
    # The training is not finished, whatever it has left behind.
    recipe.make_lm("exp/lm")
    assert "did not finish" in recipe.run_mpq("--stop_stage", "1", ok=False)
    (recipe.path / "fail_at_6").unlink()
    recipe.take_notes()
    recipe.run_mpq("--stop_stage", "1", "--train_lm", "true")
    assert [note[:3] for note in recipe.take_notes() if note[0] == "run.sh"] == [
        ["run.sh", "--stage", "6"]
    ]
    recipe.run_mpq("--stop_stage", "1", "--train_lm", "true")
    assert not [note for note in recipe.take_notes() if note[0] == "run.sh"]


def test_values_may_be_given_in_every_way(recipe):
    """With =, twice, with slashes at the end, with dashes in the name, from a file."""
    (recipe.path / "mpq.conf").write_text("budget=7.0\nmax_tokens=123\n")
    recipe.run_mpq(
        *("--config", "mpq.conf", "--lm-exp=exp/lm//", "--budget", "5.0", "--budget=3.0"),
        *("--lm_args=--max_epoch 1", "--test_sets", "test_a/ test_b", "--data-feats", "dump/raw/"),
        *("--expdir", "exp/", "--stop_stage", "4"),
    )
    commands = [note[2:] for note in recipe.take_notes() if note[0] in ("run.pl", "run.sh")]
    sensitivity, _, plan, admm = commands
    assert sensitivity[sensitivity.index("--max_tokens") + 1] == "123"
    assert plan[plan.index("--budget") + 1] == "3.0"
    given = admm[admm.index("--lm_args") + 1]
    assert given == "--init_param exp/lm/valid.loss.ave.pth --max_epoch 1"
    assert (recipe.path / "exp/mpq_lm_3.0bit/lm/config.yaml").is_file()


def test_an_mpq_sh_of_another_version_is_refused(recipe):
    script = recipe.path / "mpq.sh"
    script.write_text(script.read_text().replace("interface=1", "interface=0"))
    assert "setup_recipe . --force" in recipe.run_mpq(ok=False)
