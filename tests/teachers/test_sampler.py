import exact
import pytest
import torch

from teachers.condition import Condition
from teachers.guidance import GuidedDenoiser, guide
from teachers.randomness import sample_generators
from teachers.sampler import MaskGITSampler

NUM_SAMPLES = 20000
# What two draws of this many samples from one distribution of 243 states differ by is about 0.03.
SAMPLING_NOISE = 0.05


def sample(order="random", num_steps=exact.LENGTH, num_samples=NUM_SAMPLES, tokens=None, **settings):
    denoiser = exact.ExactDenoiser()
    condition = Condition(torch.zeros(num_samples, dtype=torch.long))
    denoise = GuidedDenoiser(denoiser, condition, 1.0)
    if tokens is None:
        tokens = torch.full((num_samples, exact.LENGTH), exact.ExactDenoiser.mask_token_id)
    sampler = MaskGITSampler(num_inference_steps=num_steps, order=order, **settings)
    generator = torch.Generator().manual_seed(0)
    return sampler(denoise, tokens, denoiser.mask_token_id, generator=generator), denoise, denoiser


def test_one_token_at_a_time_in_random_order_samples_the_joint():
    tokens, denoise, denoiser = sample()
    assert exact.total_variation(exact.histogram(tokens), exact.joint()) < SAMPLING_NOISE
    assert denoise.nfe == denoiser.num_calls == exact.LENGTH


def test_one_step_samples_the_product_of_the_marginals():
    tokens, denoise, _ = sample(num_steps=1)
    assert exact.total_variation(exact.histogram(tokens), exact.product_of_marginals()) < SAMPLING_NOISE
    assert exact.total_variation(exact.histogram(tokens), exact.joint()) > 0.6
    assert denoise.nfe == 1


def test_confidence_without_noise_reveals_the_most_confident_first():
    """Position 2 is certain, so the only token kept after the first of three steps is there."""
    seen = []

    def denoise(tokens, progress):
        seen.append(tokens.clone())
        logits = torch.zeros(1, 3, 4)
        logits[0, 2, 1] = 20
        return logits

    sampler = MaskGITSampler(num_inference_steps=3, order="confidence", choice_temperature=0.0, schedule="linear")
    sampler(denoise, torch.full((1, 3), 4), 4, generator=torch.Generator().manual_seed(0))
    assert seen[1].tolist() == [[4, 4, 1]]


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "square"])
def test_every_step_reveals_and_none_is_left(order, schedule):
    counts = []

    def denoise(tokens, progress):
        counts.append((tokens == 9).sum(-1))
        return torch.zeros(*tokens.shape, 9)

    sampler = MaskGITSampler(num_inference_steps=7, order=order, schedule=schedule)
    tokens = sampler(denoise, torch.full((2, 16), 9), 9, generator=torch.Generator().manual_seed(0))
    masked = torch.stack([*counts, (tokens == 9).sum(-1)])
    assert (masked.diff(dim=0) < 0).all()
    assert (masked[-1] == 0).all()
    assert len(counts) == 7


def test_no_more_steps_than_tokens():
    _, denoise, _ = sample(num_steps=32, num_samples=4)
    assert denoise.nfe == exact.LENGTH


def test_known_tokens_stay_and_samples_with_fewer_masks_are_finished_too():
    known = torch.tensor([[0, 3, 3, 3, 3], [1, 2, 0, 1, 3]])
    tokens, _, _ = sample(num_samples=2, num_steps=3, tokens=known)
    assert (tokens != 3).all()
    assert torch.equal(tokens[known != 3], known[known != 3])


def test_a_batch_equals_its_samples_one_by_one(teacher):
    labels = [1, 5, 9]
    whole = teacher(labels, generator=sample_generators(0, places=range(3)), output_type="tokens").tokens
    for place, label in enumerate(labels):
        alone = teacher([label], generator=sample_generators(0, places=[place]), output_type="tokens").tokens
        assert torch.equal(alone[0], whole[place])


def test_guidance_is_u_plus_s_times_c_minus_u(teacher):
    tokens = torch.randint(0, 17, (2, 16))
    condition = teacher.encode_condition([3, 7])
    with torch.no_grad():
        c = teacher.denoiser(tokens, condition)
        u = teacher.denoiser(tokens, condition.null())
        for scale in (0.0, 0.5, 1.0, 3.0):
            torch.testing.assert_close(guide(teacher.denoiser, tokens, condition, scale), u + scale * (c - u))
    assert not torch.allclose(c, u)


@pytest.mark.parametrize(("scale", "ramp", "nfe"), [(1.0, "constant", 4), (2.0, "constant", 8), (2.0, "linear", 7)])
def test_guided_evaluations_count_twice(teacher, scale, ramp, nfe):
    """A linear ramp starts at scale 1, so that its first step needs no unconditional evaluation."""
    teacher.sampler.register_to_config(guidance_ramp=ramp)
    rows = []
    teacher.denoiser.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    assert teacher([0, 1], guidance_scale=scale).nfe == nfe
    assert sum(rows) == 2 * nfe


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="order='halton'"):
        MaskGITSampler(order="halton")
