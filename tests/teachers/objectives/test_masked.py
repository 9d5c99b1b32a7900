import pytest
import torch
import torch.nn.functional as F

from teachers.objectives.masked import MaskedConfig, MaskedObjective, masked_cross_entropy
from teachers.randomness import sample_generators


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator)
    tokens = torch.randint(0, 5, (4, 6), generator=generator)
    return logits, tokens, torch.rand(4, 6, generator=generator) < 0.5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torch_s_cross_entropy_on_masked_positions(batch, smoothing):
    logits, tokens, mask = batch
    expected = F.cross_entropy(logits[mask], tokens[mask], label_smoothing=smoothing, reduction="sum") / mask.numel()
    loss = masked_cross_entropy(logits[mask], tokens[mask], mask.numel(), label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)


def test_the_mean_over_halves_is_that_of_the_batch(batch):
    def loss(rows):
        logits, tokens, mask = (part[rows] for part in batch)
        return masked_cross_entropy(logits[mask], tokens[mask], mask.numel())

    halves = torch.stack([loss(slice(2)), loss(slice(2, 4))])
    torch.testing.assert_close(halves.mean(), loss(slice(4)))


def test_soft_targets_have_the_mixture_as_their_optimum(batch):
    """At the logits of (1 - a) token + a soft target the gradient vanishes."""
    _, tokens, _ = batch
    soft = torch.rand(4, 6, 5).softmax(-1)
    optimum = 0.7 * F.one_hot(tokens, 5) + 0.3 * soft
    logits = optimum.log().requires_grad_()
    flat = logits.flatten(0, 1), tokens.flatten(), 24
    masked_cross_entropy(*flat, soft_targets=soft.flatten(0, 1), soft_weight=0.3).backward()
    assert logits.grad.abs().max() < 1e-7


def test_labels_are_dropped_at_their_rate(teacher):
    seen = []
    teacher.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].class_labels))
    objective = MaskedObjective(MaskedConfig(label_dropout=0.25), teacher.denoiser)
    tokens, condition = torch.randint(0, 16, (2000, 16)), teacher.encode_condition([3] * 2000)
    generator = sample_generators(0, places=range(2000))
    losses, metrics = objective.losses(
        {"denoiser": teacher.denoiser}, ("denoiser",), (tokens, condition), generator, measured=True
    )
    assert (seen[0] == -1).float().mean() == pytest.approx(0.25, abs=0.05)
    assert losses["denoiser"].requires_grad
    right, masked = metrics["accuracy"]
    assert 0 <= right <= masked
