"""ADMM's state: in the optimizer's checkpoint and nowhere else, bit-identical after it."""

import copy
import io

import pytest
import torch
from admm_runs import start
from found import find_clusters, weights_of

from espnet_mpq.errors import InputError, MismatchError, PlanError
from espnet_mpq.plan import ClusterSpec, Plan, uniform_plan
from espnet_mpq.training.admm import STATE_KEY, AdmmController
from espnet_mpq.training.options import AdmmOptions


def train(lm, optimizer, controller, cross_entropy, epochs, n_epochs):
    for epoch in epochs:
        torch.manual_seed(epoch)
        controller.start_epoch(n_epochs - epoch + 1)
        lm.train()
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(lm).backward()
            optimizer.step()
        controller.end_epoch()


@pytest.mark.parametrize("tying", ["row", "cluster"])
def test_resumed_run_is_bit_identical(small_rnn, cross_entropy, tying):
    def make():
        lm = small_rnn(dropout_rate=0.3)
        clusters = {c.name: ClusterSpec(2, tying=tying) for c in find_clusters(lm)}
        clusters["output"] = ClusterSpec(16)
        optimizer = torch.optim.Adam(lm.parameters(), lr=0.01)
        options = AdmmOptions(gamma=0.05, dual_period=3, projection="als", finish_epochs=2)
        return lm, optimizer, AdmmController(weights_of(lm), Plan(clusters), optimizer, options)

    whole, optimizer, controller = make()
    train(whole, optimizer, controller, cross_entropy, range(1, 6), 5)
    for stop in (2, 4):  # within ADMM, within the finishing phase
        lm, optimizer, controller = make()
        train(lm, optimizer, controller, cross_entropy, range(1, stop + 1), 5)
        file = io.BytesIO()
        torch.save({"model": lm.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file)
        again, optimizer, controller = make()
        again.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(again, optimizer, controller, cross_entropy, range(stop + 1, 6), 5)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), (stop, name)


def test_state_in_the_optimizer_leaves_the_model_alone(small_rnn, cross_entropy):
    lm = small_rnn()
    names = set(lm.state_dict())
    controller, optimizer = start(lm, optimizer=torch.optim.Adam(lm.parameters()))
    cross_entropy(lm).backward()
    optimizer.step()
    controller.end_epoch()
    assert set(lm.state_dict()) == names
    state = optimizer.state_dict()[STATE_KEY]
    assert state["n_updates"] == 1 and set(state["dual"]) == set(controller.coded)
    assert state["table"]["codes"]["output"][0].dtype == torch.uint8
    kept = copy.deepcopy(state)
    controller.load_state_dict(state)
    controller.dual["output"][0].add_(1.0)
    assert torch.equal(state["dual"]["output"][0], kept["dual"]["output"][0])


def test_foreign_states_are_refused(small_rnn):
    lm = small_rnn()
    controller, optimizer = start(lm)
    state = optimizer.state_dict()
    plain = {k: v for k, v in state.items() if k != STATE_KEY}
    with pytest.raises(MismatchError, match="no ADMM state"):
        optimizer.load_state_dict(plain)
    four = small_rnn()
    _, other = start(four, uniform_plan(find_clusters(four), 4))
    with pytest.raises(MismatchError, match="another plan"):
        other.load_state_dict(state)
    with pytest.raises(PlanError):
        start(four, Plan({"nowhere": ClusterSpec(2)}))
    fresh = torch.optim.SGD(four.parameters(), lr=0.1)
    AdmmController(weights_of(four), uniform_plan(find_clusters(four), 2), fresh, AdmmOptions())
    with pytest.raises(InputError, match="start_epoch"):
        fresh.step()
