"""Several processes that train one LM with a plan: they equal one process."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from lm_runs import ADMM, EXTRA, PLAN, assert_same, checkpoint


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "extragradient"])
def test_two_processes_equal_one_on_the_same_global_batch(train, fp, tmp_path, extra):
    options = dict(
        EXTRA if extra else ADMM, accum_grad=2, max_epoch=2, lm_conf=dict(dropout_rate=0.0)
    )
    one = train(tmp_path / "one", PLAN, init_param=[str(fp)], **options)

    def rank(number):
        def work():
            os.environ["MASTER_ADDR"] = "localhost"
            train(
                tmp_path / "two",
                PLAN,
                init_param=[str(fp)],
                **options,
                multiprocessing_distributed=False,
                dist_world_size=2,
                dist_rank=number,
                local_rank=number,
                dist_backend="gloo",
                dist_init_method=f"file://{tmp_path}/meeting",
            )

        return work

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank(number)) for number in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        assert process.exitcode == 0
    assert_same(one / "2epoch.pth", tmp_path / "two" / "2epoch.pth", atol=1e-5)
    a, b = (checkpoint(f)["reporter"]["stats"][2]["valid"] for f in (one, tmp_path / "two"))
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert a["admm_primal"] == pytest.approx(b["admm_primal"], abs=1e-5)
