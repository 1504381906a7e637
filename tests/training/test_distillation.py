"""Distillation loss: known values, direction, mask, gradient."""

import math

import torch

from espnet_mpq.training.distillation import kl_distillation


def test_known_value_and_direction():
    student = torch.tensor([[[0.5, 0.25, 0.25]]]).log()
    teacher = torch.tensor([[[0.25, 0.25, 0.5]]]).log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    assert abs(float(kl_distillation(student, teacher, mask)) - expected) < 1e-6
    skewed = torch.tensor([[[0.9, 0.05, 0.05]]]).log()
    uniform = torch.zeros(1, 1, 3)
    forward = float(kl_distillation(uniform, skewed, mask))
    assert abs(forward - (math.log(3) + 0.9 * math.log(0.9) + 0.1 * math.log(0.05))) < 1e-6
    assert abs(forward - float(kl_distillation(skewed, uniform, mask))) > 0.1


def test_mean_over_counted_tokens_only():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    loss = kl_distillation(student, teacher, mask)
    p, q = teacher.softmax(-1), student.softmax(-1)
    per_token = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(loss, per_token[mask].mean())
    loss.backward()
    assert teacher.grad is None
    assert float(student.grad[~mask].abs().max()) == 0.0
    torch.testing.assert_close(student.grad[mask], ((q - p)[mask] / mask.sum()).detach())


def test_equal_distributions_and_no_tokens_give_zero():
    logits = torch.randn(2, 3, 5)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert abs(float(kl_distillation(logits + 3.0, logits, everything))) < 1e-6
    assert float(kl_distillation(logits, logits, ~everything)) == 0.0


def test_low_precision_logits_are_compared_in_float32():
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(1, 4, 500, generator=generator).bfloat16()
    student = (teacher.float() + 0.01 * torch.randn(1, 4, 500, generator=generator)).bfloat16()
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = kl_distillation(student, teacher, mask)
    exact = kl_distillation(student.double(), teacher.double(), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float(), rtol=1e-3, atol=1e-7)
