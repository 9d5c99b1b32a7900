import pytest
import torch
from tiny_text import amused_folder

from students.initialisation import TokenInitialiser, perturb_embeddings, teacher_marginals
from teachers import MaskedDiffusionPipeline
from teachers.conditions.prompts import Prompts
from teachers.pipeline import all_classes
from teachers.randomness import sample_generators


def test_the_mask_count_is_exact(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher, mask_ratio=(0.6, 0.6))
    initial = initialiser(teacher.encode_condition([0, 1, 2]), torch.Generator().manual_seed(0))
    assert ((initial == teacher.mask_token_id).sum(-1) == 10).all()  # round(0.6 * 16)


def test_a_range_is_drawn_for_each_sample(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher, mask_ratio=(0.25, 0.75))
    initial = initialiser(teacher.encode_condition([0] * 500), sample_generators(0, places=range(500)))
    counts = (initial == teacher.mask_token_id).sum(-1)
    assert (counts.min(), counts.max()) == (4, 12)
    assert len(counts.unique()) == 9


@pytest.mark.parametrize("random_tokens", ["uniform", "marginal"])
def test_random_tokens_have_the_right_distribution(teacher, random_tokens):
    initialiser = TokenInitialiser.for_teacher(teacher, random_tokens)
    condition = teacher.encode_condition([3] * 20000)
    tokens = initialiser.random_tokens(condition, torch.Generator().manual_seed(0))
    frequency = torch.nn.functional.one_hot(tokens, 16).float().mean(0)
    expected = (
        torch.cat(list(teacher_marginals(teacher, all_classes(teacher))))[3]
        if random_tokens == "marginal"
        else torch.full((16, 16), 1 / 16)
    )
    assert (frequency - expected).abs().max() < 0.02
    if random_tokens == "marginal":
        assert (expected - 1 / 16).abs().max() > 0.1  # else the test could not tell them apart


def test_marginals_are_those_of_a_fully_masked_input(teacher):
    masks = torch.full((10, 16), teacher.mask_token_id)
    with torch.no_grad():
        expected = teacher.denoiser(masks, teacher.encode_condition(list(range(10)))).softmax(-1)
    torch.testing.assert_close(torch.cat(list(teacher_marginals(teacher, all_classes(teacher)))), expected)


@pytest.mark.parametrize("noise_scale", ["unit", "embedding"])
@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_perturbation_has_the_variance_it_says(noise_scale, sigma):
    size = 0.07
    embeddings = size * torch.randn(50, 40, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(50, 40, 64, generator=torch.Generator().manual_seed(1))
    perturbed = perturb_embeddings(embeddings, noise, sigma, noise_scale)
    unit = 1.0 if noise_scale == "unit" else size
    expected = (1 - sigma**2) * size**2 + sigma**2 * unit**2
    assert perturbed.var() == pytest.approx(expected, rel=0.03)
    correlation = (perturbed * embeddings).mean() / (perturbed.std() * embeddings.std())
    assert correlation == pytest.approx((1 - sigma**2) ** 0.5 * size / expected**0.5, abs=0.02)


def test_perturbation_of_one_sample_does_not_depend_on_the_batch(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher, embedding_noise=0.2)
    embeddings = torch.randn(3, 16, 8)
    whole = initialiser.perturb(embeddings, sample_generators(0, places=range(3)))
    alone = initialiser.perturb(embeddings[2:], sample_generators(0, places=[2]))
    torch.testing.assert_close(whole[2:], alone)


def test_settings_are_saved_with_the_marginals(teacher, tmp_path):
    initialiser = TokenInitialiser.for_teacher(teacher, "marginal", mask_ratio=(0.4, 0.5), embedding_noise=0.1)
    initialiser.save_pretrained(tmp_path)
    loaded = TokenInitialiser.from_pretrained(tmp_path)
    condition = teacher.encode_condition(list(range(10)))
    draws = [candidate(condition, torch.Generator().manual_seed(4)) for candidate in (initialiser, loaded)]
    assert torch.equal(*draws)
    assert tuple(loaded.config.mask_ratio) == (0.4, 0.5)


def test_unknown_kinds_are_refused(teacher):
    with pytest.raises(ValueError, match="random_tokens='gaussian'"):
        TokenInitialiser.for_teacher(teacher, "gaussian")


def test_random_tokens_of_prompts_are_of_their_mean_marginal(tmp_path):
    teacher = MaskedDiffusionPipeline.from_pretrained(amused_folder(tmp_path / "amused"))
    for parameter in teacher.denoiser.parameters():
        parameter.data.mul_(2)  # else all tokens are much alike
    prompts = Prompts(teacher, ["a red apple", "house", "a green car"])
    initialiser = TokenInitialiser.for_teacher(teacher, "marginal", conditions=prompts)
    with torch.no_grad():
        masks = torch.full((3, 16), teacher.mask_token_id)
        expected = teacher.denoiser(masks, teacher.encode_condition(prompts.prompts)).softmax(-1).mean(0)
        condition = teacher.encode_condition(["house"] * 20000)
    tokens = initialiser.random_tokens(condition, torch.Generator().manual_seed(0))
    frequency = torch.nn.functional.one_hot(tokens, 24).float().mean(0)
    assert (frequency - expected).abs().max() < 0.02
    assert (expected - expected.mean(0)).abs().max() > 0.04
