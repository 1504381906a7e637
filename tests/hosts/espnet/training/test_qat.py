"""--mpq_trainer qat inside the host: files on the grid, the start, a run that was interrupted."""

from __future__ import annotations

import pytest
import torch
from found import find_clusters, get_mats
from lm_runs import PLAN, assert_on_grid, assert_same, checkpoint, lm_of

from espnet_mpq.errors import InputError, MismatchError
from espnet_mpq.hosts.espnet.experiment.pack import pack_experiment
from espnet_mpq.packed.dequantize import float_state
from espnet_mpq.packed.format import PACKED_FILE, load_packed
from espnet_mpq.plan import Plan
from espnet_mpq.training.qat import STATE_KEY

QAT = dict(mpq_trainer="qat", mpq_distill=0.5, mpq_freeze=0.2, mpq_blend=0.1)


@pytest.fixture(scope="module")
def start(fp, tmp_path_factory):
    """The fp LM packed with the plan, as `mpq pack` does."""
    folder = tmp_path_factory.mktemp("start") / "packed"
    pack_experiment(fp.parent, folder, plan=Plan.from_dict(PLAN))
    return folder / PACKED_FILE


@pytest.fixture(scope="module")
def trained(train, fp, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qat") / "lm"
    return train(folder, PLAN, init_param=[str(fp)], mpq_start=str(start), **QAT)


def test_files_lie_on_the_grid_and_the_state_is_in_the_checkpoint(host, trained):
    for name in ("3epoch.pth", "valid.loss.best.pth", "valid.loss.ave_2best.pth"):
        assert_on_grid(lm_of(host, trained, name))
    saved = checkpoint(trained)
    state, stats = saved["optimizers"][0][STATE_KEY], saved["reporter"]["stats"]
    assert state["n_updates"] == 15 and state["is_frozen"]
    assert all({"ppl", "qat_distance", "qat_frozen"} <= set(stats[e]["valid"]) for e in (1, 2, 3))
    assert stats[1]["valid"]["qat_frozen"] == 0.0 < stats[3]["valid"]["qat_frozen"]
    assert stats[3]["valid"]["loss"] < stats[1]["valid"]["loss"]
    # The host's own learning rate is what it was: the controller scales it in its updates.
    assert saved["optimizers"][0]["param_groups"][0]["lr"] == 0.01


def test_the_start_is_what_is_trained(host, train, fp, start, trained, tmp_path):
    """With a learning rate of nearly nothing the first epoch saves the start itself."""
    options = dict(QAT, mpq_blend=0.0, optim_conf={"lr": 1e-12}, max_epoch=1)
    folder = train(tmp_path / "lm", PLAN, init_param=[str(fp)], mpq_start=str(start), **options)
    lm, state = lm_of(host, folder, "1epoch.pth"), float_state(load_packed(start))
    for cluster in find_clusters(lm):
        for mat, part in zip(get_mats(lm, cluster), cluster.parts):
            assert torch.equal(mat, state[part.parameter][part.start : part.stop])
    torch.testing.assert_close(lm.decoder.bias.detach(), state["decoder.bias"])


def test_resumed_run_ends_bit_identical(train, fp, start, trained, tmp_path, monkeypatch):
    """Interrupted in the second epoch, i.e. after one finished epoch, and started again."""
    from espnet_mpq.hosts.espnet.training.trainer import MpqTrainer

    stock, seen = MpqTrainer.validate_one_epoch.__func__, []

    def interrupted(cls, **arguments):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return stock(cls, **arguments)

    options = dict(QAT, init_param=[str(fp)], mpq_start=str(start))
    monkeypatch.setattr(MpqTrainer, "validate_one_epoch", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "lm", PLAN, **options)
    monkeypatch.undo()
    train(tmp_path / "lm", PLAN, **options)
    for name in ("3epoch.pth", "valid.loss.ave_2best.pth"):
        assert_same(tmp_path / "lm" / name, trained / name)


def test_mistakes_are_said(train, fp, start, tmp_path):
    other = {**PLAN, "clusters": {**PLAN["clusters"], "output": {"bits": 2}}}
    run = dict(init_param=[str(fp)], max_epoch=1)
    with pytest.raises(MismatchError, match="output"):
        train(tmp_path / "a", other, mpq_start=str(start), **QAT, **run)
    with pytest.raises(InputError, match="mpq_start"):
        train(tmp_path / "b", PLAN, mpq_start=str(start), **run)
    with pytest.raises(InputError, match="admm or qat"):
        train(tmp_path / "c", PLAN, mpq_trainer="lsq", **run)
