"""Runs with a plan that were interrupted, killed or meant for another folder."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from lm_runs import ADMM, EXTRA, PLAN, assert_same, checkpoint

from espnet_mpq.errors import CheckpointError, MismatchError
from espnet_mpq.training.admm import STATE_KEY


@pytest.mark.parametrize("options", [ADMM, dict(EXTRA, accum_grad=2)], ids=["plain", "extra"])
def test_resumed_run_ends_bit_identical(train, fp, whole, tmp_path, monkeypatch, options):
    """Interrupted in the second epoch, i.e. after one finished epoch, and started again."""
    from espnet_mpq.hosts.espnet.training.trainer import MpqTrainer

    if options is ADMM:
        right = whole
    else:
        right = train(tmp_path / "right", PLAN, init_param=[str(fp)], **options)
    stock = MpqTrainer.validate_one_epoch.__func__
    seen = []

    def interrupted(cls, **arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return stock(cls, **arguments)

    monkeypatch.setattr(MpqTrainer, "validate_one_epoch", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "lm", PLAN, init_param=[str(fp)], **options)
    monkeypatch.undo()
    train(tmp_path / "lm", PLAN, init_param=[str(fp)], **options)
    for name in ("3epoch.pth", "valid.loss.ave_2best.pth"):
        assert_same(tmp_path / "lm" / name, right / name)


def in_child(function):
    """Run ``function`` in a forked child (the host is imported already); its exit code."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(240)
    if child.is_alive():
        child.kill()
        pytest.fail("child process hangs")
    return child.exitcode


def test_raised_max_epoch_leaves_the_finishing_phase(train, fp, whole, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(whole, folder, symlinks=True)
    train(folder, PLAN, init_param=[str(fp)], **dict(ADMM, max_epoch=6))
    saved = checkpoint(folder)
    stats = saved["reporter"]["stats"]
    assert stats[3]["valid"]["admm_primal"] == 0.0 < stats[4]["valid"]["admm_primal"]
    assert stats[6]["valid"]["admm_primal"] == 0.0
    before = checkpoint(whole)["optimizers"][0][STATE_KEY]["finishing"]["start"]["codes"]
    after = saved["optimizers"][0][STATE_KEY]["finishing"]["start"]["codes"]
    assert any(not torch.equal(a, b) for n in before for a, b in zip(before[n], after[n]))


MOMENTS = ["in the epoch", "in the first checkpoint.pth", "in checkpoint.pth", "before 2epoch.pth"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_goes_on_from_the_last_checkpoint(train, fp, whole, tmp_path, moment):
    def killed():
        from espnet_mpq.training.admm import AdmmController

        def kill():
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "in the epoch":
            after = AdmmController._after_step

            def counted(self):
                after(self)
                if self.n_updates == 7:
                    kill()

            AdmmController._after_step = counted
        else:
            save = torch.save

            def cut(value, path, *args, **kwargs):
                if moment == "before 2epoch.pth" and str(path).endswith("2epoch.pth"):
                    kill()
                save(value, path, *args, **kwargs)
                if moment.endswith(" checkpoint.pth") and "optimizers" in value:
                    if len(value["reporter"]["stats"]) == (1 if "first" in moment else 2):
                        os.truncate(path, os.path.getsize(path) // 2)
                        kill()

            torch.save = cut
        train(tmp_path / "lm", PLAN, init_param=[str(fp)], **ADMM)

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "lm" / "3epoch.pth").exists()
    train(tmp_path / "lm", PLAN, init_param=[str(fp)], **ADMM)
    assert_same(tmp_path / "lm" / "3epoch.pth", whole / "3epoch.pth")
    for link in ("valid.loss.best.pth", "latest.pth"):
        assert os.readlink(tmp_path / "lm" / link) == os.readlink(whole / link)
    half = tmp_path / "lm" / "checkpoint.half.pth"
    assert half.exists() == ("first" in moment)


def test_damaged_checkpoint_without_a_previous_one_is_one_clear_error(train, fp, whole, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(whole, folder, symlinks=True)
    os.truncate(folder / "checkpoint.pth", 1000)
    with pytest.raises(CheckpointError, match="checkpoint.pth is damaged.*writes over 2epoch.pth"):
        train(folder, PLAN, init_param=[str(fp)], **ADMM)


def test_other_plan_or_fp_checkpoint_in_the_folder_is_refused(train, fp, whole, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(whole, folder, symlinks=True)
    other = copy.deepcopy(PLAN)
    other["clusters"]["output"]["bits"] = 8
    with pytest.raises(MismatchError, match="another plan"):
        train(folder, other, init_param=[str(fp)], **dict(ADMM, max_epoch=5))
    with pytest.raises(MismatchError, match="no ADMM state"):
        shutil.copy(fp.parent / "checkpoint.pth", folder / "checkpoint.pth")
        train(folder, PLAN, init_param=[str(fp)], **dict(ADMM, max_epoch=5))
