"""The wrapped optimizer under gradient scalers and learning rate schedulers."""

import copy

import pytest
import torch
from admm_runs import start, zero_gradients


def test_update_skipped_by_the_gradient_scaler_is_skipped_by_admm(small_rnn, cross_entropy):
    if not hasattr(getattr(torch, "amp", None), "GradScaler"):
        pytest.skip("this torch has no gradient scaler for CPUs")
    lm = small_rnn()
    controller, optimizer = start(lm, gamma=0.3, optimizer=torch.optim.Adam(lm.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(lm.state_dict())
    # Without autocast: not every CPU has a bfloat16 LSTM, and the scaler asks for none.
    scaler.scale(cross_entropy(lm)).backward()
    lm.decoder.bias.grad[0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert controller.n_updates == 0
    assert all(torch.equal(v, lm.state_dict()[k]) for k, v in before.items())
    optimizer.zero_grad()
    scaler.scale(cross_entropy(lm)).backward()
    scaler.unscale_(optimizer)
    gradient = lm.decoder.weight.grad.clone()
    scaler.step(optimizer)
    assert controller.n_updates == 1
    expected = gradient + 0.3 * (before["decoder.weight"] - controller.table.values("output")[0])
    torch.testing.assert_close(lm.decoder.weight.grad, expected)


def test_learning_rate_schedulers_see_the_steps(small_rnn, recwarn):
    lm = small_rnn()
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    start(lm, optimizer=optimizer)
    zero_gradients(lm)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
