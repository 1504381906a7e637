"""The family of errors: parts that programs can read, kinds, places, and their text."""

from __future__ import annotations

import copy
import errno
import pickle

import pytest

from espnet_mpq import errors
from espnet_mpq.errors import InputError, MpqError, PlanError, WriteError, near_matches
from espnet_mpq.io import write_error
from espnet_mpq.plan import Plan

FAMILY = [errors.MpqError, *errors.MpqError.__subclasses__()]
FAMILY += errors.InputError.__subclasses__()
PARTS = ("what", "found", "expected", "todo", "place")


def parts(error):
    return [getattr(error, name) for name in PARTS]


def test_the_parts_are_kept_and_make_the_text():
    error = InputError("--seed", found=-1, expected="0 .. 9", todo="give another")
    assert parts(error) == ["--seed", -1, "0 .. 9", "give another", None]
    assert str(error) == "--seed: found -1; expected 0 .. 9; give another"
    assert str(InputError("nothing more")) == "nothing more"
    assert str(InputError("a", found=0, todo="")) == "a: found 0"


def test_every_kind_has_a_word_of_its_own():
    kinds = [cls.kind for cls in FAMILY if cls.__module__ == "espnet_mpq.errors"]
    assert len(set(kinds)) == len(kinds) and all(kind.islower() for kind in kinds)
    assert not any(issubclass(cls, RuntimeError) for cls in FAMILY)


def test_at_names_the_place_once_per_call_and_keeps_type_and_parts():
    error = PlanError("no bits", found=3)
    there = error.at("a.json").at("x/a.zip")
    assert type(there) is PlanError and there.found == 3 and there.place == "x/a.zip"
    assert str(there) == "x/a.zip: a.json: no bits: found 3"
    assert error.place is None and str(error) == "no bits: found 3"


def test_advising_changes_the_advice_alone():
    full = write_error("a", OSError(errno.ENOSPC, "No space left on device"))
    other = full.advising("go on")
    assert type(other) is WriteError and other.is_full and other.found == full.found
    assert str(other) == "cannot write a: found No space left on device; go on"
    assert "nothing was changed" in str(full)


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_errors_travel_between_processes(again):
    full = write_error("a", OSError(errno.ENOSPC, "No space left on device"))
    for error in [cls("w", found=1, todo="t").at("p") for cls in FAMILY] + [full]:
        back = again(error)
        assert type(back) is type(error) and str(back) == str(error)
        assert vars(back) == vars(error)
    assert again(full).is_full


def test_a_full_disk_is_told_from_a_forbidden_one():
    for number, is_full in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)):
        error = write_error("a", OSError(number, "x"))
        assert isinstance(error, WriteError) and error.is_full is is_full


def test_a_plan_file_is_named_by_its_error(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"clusters": {"output": {"bits": 5}}}')
    with pytest.raises(PlanError) as caught:
        Plan.read(path)
    assert caught.value.place == str(path) and caught.value.found == "5"
    assert str(caught.value).startswith(f"{path}: plan, cluster output: unsupported bits: found 5")
    assert isinstance(caught.value.__cause__, MpqError)


def test_near_matches():
    assert near_matches("bitz", ["bits", "text"]) == "did you mean 'bits'?"
    assert near_matches("q", ["bits", "text"]) == "known: bits, text"
    assert near_matches("q", map(str, range(20))).endswith("10, 11, ...")
