from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from distill.methods import divergence
from distill.methods.divergence import divergence_gradient, jeffreys_divergence, with_gradient

GOLDEN = load_file(Path(__file__).parents[2] / "data" / "divergence.safetensors")
BETAS = ["-0.2", "0.0", "0.5", "1.0"]


def golden_logits():
    unconditional, conditional = GOLDEN["teacher_unconditional"], GOLDEN["teacher_conditional"]
    return unconditional + 2 * (conditional - unconditional), GOLDEN["auxiliary"], GOLDEN["mask"].bool()


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_equals_the_golden_numbers(beta):
    teacher, auxiliary, mask = golden_logits()
    value = jeffreys_divergence(teacher, auxiliary, float(beta))
    torch.testing.assert_close(value[mask], GOLDEN[f"divergence_beta_{beta}"][mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_equals_the_golden_numbers(beta):
    teacher, auxiliary, mask = golden_logits()
    gradient = divergence_gradient(teacher[mask], auxiliary[mask], float(beta))
    logits = torch.zeros_like(teacher, requires_grad=True)
    with_gradient(logits, mask.flatten().nonzero()[:, 0], gradient).backward()
    torch.testing.assert_close(logits.grad, GOLDEN[f"gradient_beta_{beta}"], atol=1e-6, rtol=1e-4)
    assert (logits.grad[~mask] == 0).all()


@given(st.floats(-3, 3), st.integers(0, 2**32))
def test_gradient_equals_autograd_for_any_beta(beta, seed):
    generator = torch.Generator().manual_seed(seed)
    teacher, auxiliary = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    auxiliary.requires_grad_()
    (expected,) = torch.autograd.grad(jeffreys_divergence(teacher, auxiliary, beta).sum(), auxiliary)
    chunk = divergence.CPU_CHUNK
    try:
        for divergence.CPU_CHUNK in (7, 14, 2**19):  # one row at a time, two, all
            gradient = divergence_gradient(teacher.flatten(0, 1), auxiliary.flatten(0, 1), beta)
            torch.testing.assert_close(gradient.view_as(expected), expected)
    finally:
        divergence.CPU_CHUNK = chunk


@pytest.mark.parametrize("beta", [0.0, -0.2])
def test_compiled_or_not_the_gradient_is_the_same(beta, monkeypatch):
    monkeypatch.setattr(divergence, "CPU_CHUNK", 7 * 10)
    for num_positions in (25, 32):  # 10, 10 and 5 of them; 10, 10, 10 and 2
        teacher, auxiliary = torch.randn(2, num_positions, 7)
        expected = divergence_gradient(teacher, auxiliary, beta)
        gradient = divergence_gradient(teacher, auxiliary, beta, out=teacher, compiled=True)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_equal_distributions_have_no_divergence(beta):
    logits = torch.randn(6, 7)
    assert jeffreys_divergence(logits + 1, logits, beta).abs().max() < 1e-5
    assert divergence_gradient(logits + 1, logits, beta).abs().max() < 1e-6


def test_half_precision_logits_are_computed_in_float32():
    teacher, auxiliary, mask = golden_logits()
    teacher, auxiliary = teacher[mask].bfloat16(), auxiliary[mask].bfloat16()
    expected = divergence_gradient(teacher.float(), auxiliary.float(), 0.5)
    gradient = divergence_gradient(teacher, auxiliary, 0.5, out=teacher)
    assert gradient is teacher
    torch.testing.assert_close(gradient, expected.bfloat16())


def test_backward_hands_the_gradient_to_the_logits():
    logits, gradient = torch.randn(2, 3, 7, requires_grad=True), torch.randn(4, 7)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    expected = 2 * gradient
    (2 * with_gradient(logits, mask.flatten().nonzero()[:, 0], gradient)).backward()
    torch.testing.assert_close(logits.grad[mask], expected)
    assert (logits.grad[~mask] == 0).all()
