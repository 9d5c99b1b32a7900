import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from teachers import MaskedDiffusionPipeline
from teachers.cost import FORMULAS, cost_summary, count_operations, decoder_flops, forward_flops, num_parameters
from teachers.released.sizes import RELEASED, random_components


@pytest.mark.parametrize(
    ("name", "millions"),
    [("halton-tiny-256", 23), ("halton-small-256", 69), ("halton-base-256", 142), ("halton-large-384", 480)],
)
def test_the_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        network, _ = RELEASED[name]()
    assert round(num_parameters(network) / 1e6) == millions


def test_the_cost_of_an_imagenet_student():
    """174.161 M and 93.9 GFLOP for the released network, whose output has rows and columns that nobody reads."""
    with torch.device("meta"):
        pipeline = MaskedDiffusionPipeline(**random_components("maskgit-256"))
    released = num_parameters(pipeline.denoiser) + 257 * 2026 - 256 * 1024
    assert round(released / 1e3) == 174_161
    more_logits = 2 * 768 * (257 * 2026 - 256 * 1024)
    assert forward_flops(pipeline.denoiser) + more_logits == pytest.approx(93.9e9, rel=1e-3)
    assert decoder_flops(pipeline.tokenizer) == pytest.approx(252.7e9, rel=1e-3)
    assert "173.9 M parameters" in cost_summary(pipeline)


def test_a_linear_layer_counts_twice_its_weights(teacher):
    """Of a patch tokenizer nothing is computed; of the transformer, mostly matrix products."""
    assert decoder_flops(teacher.tokenizer) == 0
    small = forward_flops(teacher.denoiser)
    weights = sum(parameter.numel() for name, parameter in teacher.denoiser.named_parameters() if "blocks" in name)
    assert small > 2 * 16 * weights * 0.9


def test_what_cannot_be_counted_ends_nothing(teacher, monkeypatch):
    def fails(*arguments, **keywords):
        raise AssertionError("an operation that nobody thought of")

    with torch.no_grad(), count_operations() as counter:
        expected = teacher.denoiser(torch.zeros(1, 16, dtype=torch.long), teacher.encode_condition([3]))
    counted = counter.get_total_flops()
    monkeypatch.setattr("teachers.cost.FORMULAS", dict.fromkeys((*FORMULAS, torch.ops.aten.addmm), fails))
    with torch.no_grad(), count_operations() as counter:
        result = teacher.denoiser(torch.zeros(1, 16, dtype=torch.long), teacher.encode_condition([3]))
    assert torch.equal(result, expected)
    assert 0 < counter.get_total_flops() < counted

    monkeypatch.setattr("teachers.cost.forward_flops", fails)
    assert "0.0 M parameters" in cost_summary(teacher)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_by_its_formula_whatever_kernel_does_it(device, kernel):
    """Scores 2 L S E and sums 2 L S D for each of B H heads, and twice that in the backward pass."""
    query, key, value = (torch.randn(2, 3, length, 8, device=device, requires_grad=True) for length in (5, 7, 7))
    forward = 2 * 3 * 2 * 5 * 7 * (8 + 8)
    with sdpa_kernel(kernel) if device == "cpu" else contextlib.nullcontext():
        with torch.no_grad(), count_operations() as counter:
            F.scaled_dot_product_attention(query, key, value)
        assert counter.get_total_flops() == forward
        with count_operations() as counter:
            F.scaled_dot_product_attention(query, key, value).sum().backward()
        assert counter.get_total_flops() == 3 * forward
