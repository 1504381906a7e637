"""--config files under the command line, near matches, provenance, progress."""

from __future__ import annotations

import argparse

import pytest

from espnet_mpq.bin.options import Parser, check_group, parse, provenance
from espnet_mpq.errors import InputError
from espnet_mpq.io import sha256_file
from espnet_mpq.progress import progress


def make_parser():
    parser = Parser(prog="mpq test")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, nargs="+", choices=(1, 2, 4), default=[1])
    parser.add_argument("--budget", type=float)
    parser.add_argument("--method", choices=("kl", "hessian", "fisher"), default="kl")
    parser.add_argument("--no_train", action="store_true")
    return parser


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_file_gives_options_and_the_command_line_wins(config):
    path = config("text: a b.txt\nbits: [2, 4]\nbudget: -1.5\nno_train: true\n")
    args = parse(make_parser(), ["--config", path])
    assert (args.text, args.bits, args.budget, args.no_train) == ("a b.txt", [2, 4], -1.5, True)
    args = parse(make_parser(), ["exp", "--text", "c", "--bits", "1", f"--config={path}"])
    assert (args.folder, args.text, args.bits, args.budget) == ("exp", "c", [1], -1.5)
    assert args.command_line == f"mpq test exp --text c --bits 1 --config={path}"


def test_empty_file_null_and_false_change_nothing(config):
    args = parse(make_parser(), ["--text", "t", "--config", config("")])
    assert args.bits == [1]
    args = parse(make_parser(), ["--text", "t", "--config", config("budget:\nno_train: false\n")])
    assert args.budget is None and args.no_train is False


@pytest.mark.parametrize(
    "text, message",
    [
        ("bist: [1]", "unknown key 'bist'.*did you mean 'bits'"),
        ("config: x", "unknown key 'config'"),
        ("folder: x", "folder is given on the command line"),
        ("text: [a, b]", "expected one value"),
        ("text: {a: b}", "nested"),
        ("no_train: maybe", "true or false"),
        ("- a\n- b", r"found \['a', 'b'\]; expected key: value"),
        ("1: x", "found 1; expected key: value"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_files_are_refused(config, text, message):
    with pytest.raises(InputError, match=message):
        parse(make_parser(), ["--text", "t", "--config", config(text)])


def test_missing_file_and_unknown_option(tmp_path):
    with pytest.raises(InputError, match="cannot read .*none.yaml"):
        parse(make_parser(), ["--text", "t", "--config", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="--bugdet.*did you mean '--budget'"):
        parse(make_parser(), ["--text", "t", "--bugdet=2"])


def test_bad_values_are_usage_errors_wherever_they_stand(config, capsys):
    for argv in (["--bits", "3"], ["--config", config("bits: [3]")], ["--config"]):
        with pytest.raises(SystemExit) as stop:
            parse(make_parser(), ["--text", "t", *argv])
        assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--method", "hesian"], "--method: invalid choice: 'hesian'; did you mean 'hessian'?"),
        (["--config"], "--method: invalid choice: 'fishr'; did you mean 'fisher'?"),
        (["--method=x"], "--method: invalid choice: 'x'; known: kl, hessian, fisher"),
        (["--bits", "1", "12"], "--bits: invalid choice: 12; known: 1, 2, 4"),
    ],
)
def test_misspelt_choices_get_near_matches(config, capsys, argv, message):
    argv = [*argv, config("method: fishr")] if argv == ["--config"] else argv
    with pytest.raises(SystemExit) as stop:
        parse(make_parser(), ["--text", "t", *argv])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"mpq test: error: argument {message}\n")


def test_provenance_has_options_and_hashes(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("x")
    args = parse(make_parser(), ["--text", str(path)])
    record = provenance(args, {"text": path, "none": None})
    assert record["inputs"] == {"text": {"path": str(path), "sha256": sha256_file(path)}}
    assert record["options"]["bits"] == [1] and record["options"]["budget"] is None
    assert "config" not in record["options"]
    assert record["command_line"] == f"mpq test --text {path}"


def test_progress_passes_everything_and_ends_with_a_line(capsys):
    assert list(progress(iter("abc"), 3, "work")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines()[-1] == "work: 3/3, 0 s to go"


def test_a_misspelt_option_is_named_before_one_that_is_missing():
    for words, name, todo in (
        (["--txet", "a"], "--txet", "did you mean '--text'"),
        (["--tex", "t"], "--tex", "did you mean '--text'"),  # no abbreviations
        (["--text", "a", "--bugdet=2"], "--bugdet", "did you mean '--budget'"),
        (["-text", "a"], "-text", "did you mean '--text'"),
        (["--text", "-x.txt"], "-x.txt", "given as --option=VALUE"),
    ):
        with pytest.raises(InputError, match=f"unknown option {name}: .*{todo}"):
            parse(make_parser(), words)
    args = parse(make_parser(), ["--text=-x.txt", "--budget", "-1", "--", "--folder"])
    assert (args.text, args.budget, args.folder) == ("-x.txt", -1.0, "--folder")


@pytest.mark.parametrize("value, part", [("", "empty"), ("  ", "empty"), ("a\udcff", "UTF-8")])
def test_values_that_are_no_names(value, part):
    for words, name in ((["--text", value], "--text"), (["--text", "t", value], "folder")):
        with pytest.raises(InputError, match=f"^{name}: found .*{part}"):
            parse(make_parser(), words)


@pytest.mark.parametrize(
    "text, message",
    [
        ("text: on", "text: found True; expected text, in quotes"),
        ("text: 2021-01-01", "found datetime.date.*expected text, in quotes"),
        ("method: no", "method: found False; expected text"),
        ("budget: yes", "budget: found True; expected a number"),
        ("bits: [1, yes]", "bits: found True; expected a number"),
        ("text: ''", "--text: found '', an empty text"),
    ],
)
def test_yaml_values_of_another_kind(config, text, message):
    with pytest.raises(InputError, match=message):
        parse(make_parser(), ["--config", config(text), *([] if "text" in text else ["--text=t"])])


def test_numbers_in_any_spelling(config):
    for text, budget in (("1e-3", 1e-3), (".5", 0.5), ("1_000", 1000.0), ("'2'", 2.0)):
        args = parse(make_parser(), ["--text", "t", "--config", config(f"budget: {text}")])
        assert args.budget == budget


def test_group_and_its_size_come_together():
    def namespace(tying, size):
        return argparse.Namespace(tying=tying, group_size=size)

    for tying, size, message in (
        ("group", None, "--tying group needs --group_size: expected columns"),
        ("row", 64, "goes with --tying group: found --group_size 64 with --tying row"),
        (None, 64, "goes with --tying group: found --group_size 64$"),
        ("group", 0, "--group_size: found 0; expected 1 .. 2147483647"),
        ("group", 10**12, "--group_size: found 1000000000000"),
    ):
        with pytest.raises(InputError, match=message):
            check_group(namespace(tying, size))
    check_group(namespace("group", 64))
    check_group(namespace("group", None), may_follow_table=True)
    check_group(namespace(None, 64), may_follow_table=True)
