import exact
import pytest
import torch
from recorder import masks, no_condition

from teachers import (
    ConfidenceThresholdSampler,
    EntropyBoundedSampler,
    FirstHittingSampler,
    HaltonSampler,
    MaskGITSampler,
    PUNTSampler,
    ReMDMSampler,
)
from teachers.guidance import GuidedDenoiser

NUM_SAMPLES = 10000
# What two draws of this many samples from one distribution of 243 states differ by is about 0.04.
SAMPLING_NOISE = 0.05


def sample_joint(sampler, num_samples=NUM_SAMPLES):
    """Total variation to the exact joint, and the mean NFE."""
    denoise = GuidedDenoiser(exact.ExactDenoiser(), no_condition(num_samples))
    generator = torch.Generator().manual_seed(0)
    tokens = sampler(denoise, masks(denoise, exact.LENGTH), generator=generator)
    return exact.total_variation(exact.histogram(tokens), exact.joint()), denoise.nfe.double().mean().item()


def sample_pairs(sampler, num_samples=400, num_pairs=24):
    """Total variation of pairs to their joint, the largest correlation between pairs, and the mean NFE."""
    denoise = GuidedDenoiser(exact.PairDenoiser(), no_condition(num_samples))
    generator = torch.Generator().manual_seed(0)
    tokens = sampler(denoise, masks(denoise, 2 * num_pairs), generator=generator)
    pairs = tokens.unflatten(-1, (num_pairs, 2))
    frequencies = torch.bincount((3 * pairs[..., 0] + pairs[..., 1]).flatten(), minlength=9) / (num_samples * num_pairs)
    correlation = torch.corrcoef(pairs[..., 0].double().T).triu(1).abs().max().item()
    variation = exact.total_variation(frequencies, exact.PairDenoiser.joint())
    return variation, correlation, denoise.nfe.double().mean().item()


@pytest.mark.parametrize(
    "sampler",
    [
        MaskGITSampler(exact.LENGTH, order="random"),
        HaltonSampler((exact.LENGTH,), exact.LENGTH),
        FirstHittingSampler(),
        EntropyBoundedSampler(0.0),
        ConfidenceThresholdSampler(1.0),
        PUNTSampler(1e-4, verify=True),
        PUNTSampler(1e-4, verify=True, order="random"),
    ],
    ids=lambda sampler: type(sampler).__name__ + sampler.config.get("order", ""),
)
def test_one_token_at_a_time_samples_the_joint(sampler):
    variation, nfe = sample_joint(sampler)
    assert variation < SAMPLING_NOISE
    if not isinstance(sampler, PUNTSampler):
        assert nfe == exact.LENGTH


def test_parallel_sampling_misses_the_joint_and_one_step_gives_the_product_of_its_marginals():
    assert sample_joint(MaskGITSampler(2, order="random"))[0] > 0.4
    assert sample_joint(MaskGITSampler(2, order="confidence"))[0] > 0.4
    variation, nfe = sample_joint(MaskGITSampler(1))
    assert variation == pytest.approx(exact.total_variation(exact.product_of_marginals(), exact.joint()), abs=0.05)
    assert nfe == 1


def test_looser_bounds_spend_fewer_evaluations_and_err_more():
    for tight, loose in [
        (EntropyBoundedSampler(0.1), EntropyBoundedSampler(1.0)),
        (PUNTSampler(0.01), PUNTSampler(0.5)),
    ]:
        (tight_variation, tight_nfe), (loose_variation, loose_nfe) = sample_joint(tight), sample_joint(loose)
        assert tight_variation < loose_variation
        assert tight_nfe > loose_nfe


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_punt_samples_independent_pairs_in_fewer_evaluations_and_parallel_confidence_does_not(order):
    variation, correlation, nfe = sample_pairs(PUNTSampler(1e-3, order=order))
    exact_variation, exact_correlation, exact_nfe = sample_pairs(FirstHittingSampler())
    assert exact_nfe == 48
    assert nfe < 16  # two steps of one evaluation and at most six rounds would be 13
    assert max(variation, exact_variation) < 0.02
    assert max(correlation, exact_correlation) < 0.25  # the largest of 276 of independent samples is about 0.17
    assert sample_pairs(MaskGITSampler(round(nfe), order="confidence"))[0] > 0.03


def test_remasking_with_many_steps_samples_the_joint():
    few, _ = sample_joint(ReMDMSampler(5, eta=0.2), 4000)
    many, _ = sample_joint(ReMDMSampler(80, eta=0.2), 4000)
    assert few > 0.2
    assert many < 0.08
