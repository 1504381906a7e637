"""ADMM in several processes: one table and one dual, even where projections differ."""

import copy
import multiprocessing

import pytest
import torch
from found import find_clusters, weights_of

from espnet_mpq.plan import uniform_plan
from espnet_mpq.training import admm
from espnet_mpq.training.on_grid import OnGrid, project, share
from espnet_mpq.training.options import AdmmOptions


def noisy(mats, plan, **options):
    """The projection as another process may find it: other scales, other codes."""
    table = project(mats, plan, **options)
    scales = {n: [s * 1.25 for s in parts] for n, parts in table.scales.items()}
    codes = {n: [c ^ 1 for c in parts] for n, parts in table.codes.items()}
    return OnGrid(plan, scales, codes)


def work(rank, lm, plan, loss, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    if rank == 1:
        admm.project = noisy
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    # saved="table": the projection of the weights for validation is nobody else's business.
    options = AdmmOptions(gamma=0.1, dual_period=2, saved="table", finish_epochs=1)
    controller = admm.AdmmController(weights_of(lm), plan, optimizer, options)
    states = []
    for n_epochs_left in (3, 2, 1):
        controller.start_epoch(n_epochs_left)
        states.append(copy.deepcopy(controller.state_dict()))
        for _ in range(3):
            optimizer.zero_grad()
            loss(lm).backward()
            optimizer.step()
        controller.end_epoch()
        states.append(copy.deepcopy(controller.state_dict()))
    torch.save({"states": states, "lm": lm.state_dict()}, folder / f"{rank}.pth")
    torch.distributed.barrier()


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize("tying", ["row", "model"])
def test_every_process_takes_the_table_of_the_first(small_rnn, cross_entropy, tmp_path, tying):
    lm = small_rnn()
    plan = uniform_plan(find_clusters(lm), 2, tying=tying)
    arguments = (lm, plan, cross_entropy, tmp_path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert_equal(first, second)
    assert any(float(u.abs().max()) > 0 for us in first["states"][1]["dual"].values() for u in us)
    assert first["states"][-1]["finishing"] is not None


def test_one_process_keeps_its_table(small_rnn):
    lm = small_rnn()
    controller = admm.AdmmController(
        weights_of(lm),
        uniform_plan(find_clusters(lm), 2),
        torch.optim.SGD(lm.parameters(), lr=0.1),
        AdmmOptions(),
    )
    controller.start_epoch(3)
    assert share(controller.table) is controller.table
