"""Runs with a plan that must not start, or must not end in silence."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from lm_runs import ADMM, PLAN

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.io import sha256_file

SHORT = dict(ADMM, max_epoch=1, mpq_finish_epochs=0)


def plan_made_for(path_or_hash):
    plan = copy.deepcopy(PLAN)
    plan["provenance"] = {"checkpoint_sha256": path_or_hash}
    return plan


def warnings_about_init(caplog):
    return [r for r in caplog.records if "--init_param" in r.getMessage()]


def test_training_from_random_weights_is_announced(train, fp, whole, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    folder = train(tmp_path / "lm", PLAN, **SHORT)
    (warning,) = warnings_about_init(caplog)
    assert warning.levelno == logging.WARNING and "RANDOM WEIGHTS" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    caplog.clear()
    train(folder, PLAN, **dict(SHORT, max_epoch=2))  # resumes: nothing to announce
    train(tmp_path / "started", PLAN, init_param=[str(fp)], **SHORT)
    assert not warnings_about_init(caplog)


def test_plan_of_another_checkpoint_is_refused(train, fp, tmp_path):
    right = sha256_file(fp)
    folder = train(tmp_path / "lm", plan_made_for(right), init_param=[str(fp)], **SHORT)
    wrong = "0" * 64
    with pytest.raises(MismatchError) as caught:
        train(tmp_path / "other", plan_made_for(wrong), init_param=[str(fp)], **SHORT)
    message = str(caught.value)
    assert right in message and wrong in message and "mpq plan" in message
    assert not (tmp_path / "other" / "1epoch.pth").exists()
    # A part of a file, and a run that resumes, are none of this check's business.
    train(tmp_path / "part", plan_made_for(wrong), init_param=[f"{fp}:lm:lm"], **SHORT)
    longer = dict(SHORT, max_epoch=2)
    train(folder, plan_made_for(wrong), init_param=[str(fp)], **longer)
    assert (folder / "2epoch.pth").exists()


def test_a_run_without_one_update_is_an_error(train, fp, tmp_path):
    options = dict(SHORT, accum_grad=6)  # of 5 batches
    for _ in range(2):  # the second call has no epoch left to run
        with pytest.raises(InputError, match="no update was made.*accum_grad 6"):
            train(tmp_path / "lm", PLAN, init_param=[str(fp)], **options)
    train(tmp_path / "five", PLAN, init_param=[str(fp)], **dict(SHORT, accum_grad=5))


def test_teacher_and_several_gpus_in_one_process_are_refused(host):
    from espnet_mpq.hosts.espnet.training.teacher import attach_teacher

    lm = host.lm_choices.get_class("seq_rnn")(vocab_size=5, unit=4, nlayers=2)
    model = host.model_choices.get_class("mpq_lm")(lm=lm, vocab_size=5)
    options = SimpleNamespace(mpq_distill=0.5, mpq_teacher=None, init_param=["fp.pth"])
    with pytest.raises(InputError, match="ngpu 2.*--multiprocessing_distributed true"):
        attach_teacher(model, "lm.", lm, options, SimpleNamespace(ngpu=2, distributed=False))
    assert model.teacher is None
    for ngpu, distributed in ((1, True), (1, False), (0, False)):
        model.set_teacher(None, 0.0)
        option = SimpleNamespace(ngpu=ngpu, distributed=distributed)
        attach_teacher(model, "lm.", lm, options, option)
        assert model.teacher is not None
    options.mpq_distill = 0.0
    attach_teacher(model, "lm.", lm, options, SimpleNamespace(ngpu=2, distributed=False))


def test_fused_optimizer_with_amp_is_refused(host):
    from espnet_mpq.hosts.espnet.training.run_checks import refuse_unsupported

    parameter = torch.nn.Parameter(torch.zeros(2))
    plain, fused = (torch.optim.Adam([parameter]) for _ in range(2))
    fused._step_supports_amp_scaling = True  # as torch marks them; some need a GPU
    refuse_unsupported([plain], SimpleNamespace(use_amp=True))
    refuse_unsupported([fused], SimpleNamespace(use_amp=False))
    with pytest.raises(InputError, match="fused optimizer.*Adam"):
        refuse_unsupported([fused], SimpleNamespace(use_amp=True))
    try:
        fused = torch.optim.Adam([parameter], fused=True)
    except (RuntimeError, TypeError):
        return  # this torch has none for CPUs
    with pytest.raises(InputError, match="fused optimizer"):
        refuse_unsupported([fused], SimpleNamespace(use_amp=True))
