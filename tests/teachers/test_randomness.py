import math

import pytest
import torch

from teachers.randomness import derive_seed, invert_cumulative, rand, sample_generators, sample_tokens


def frequencies(logits, **settings):
    draws = sample_tokens(logits.expand(1, 40000, -1), torch.Generator().manual_seed(0), **settings)
    return torch.bincount(draws.flatten(), minlength=logits.shape[-1]) / 40000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_tempered_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = (logits / temperature).softmax(-1)
    tolerance = 5 * (expected * (1 - expected) / 40000).sqrt()
    assert ((frequencies(logits, temperature=temperature) - expected).abs() < tolerance).all()


def test_temperature_zero_takes_the_most_probable_token():
    logits = torch.randn(2, 3, 5)
    assert torch.equal(sample_tokens(logits, temperature=0), logits.argmax(-1))


def test_top_k_and_top_p_keep_the_right_tokens_in_proportion():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert frequencies(logits, top_k=2)[2:].sum() == 0
    assert frequencies(logits, top_k=2)[0] == pytest.approx(0.5 / 0.8, abs=0.015)
    # The nucleus is the smallest set that holds at least top_p.
    assert (frequencies(logits, top_p=0.75) > 0).tolist() == [True, True, False, False]
    assert (frequencies(logits, top_p=0.81) > 0).tolist() == [True, True, True, False]
    assert (frequencies(logits, top_p=0.01) > 0).tolist() == [True, False, False, False]


def test_impossible_tokens_are_never_drawn_even_at_the_edges():
    cumulative = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64).expand(1, 3, -1).contiguous()
    edges = torch.tensor([[0.0, 0.5, 1 - 2**-24]])
    assert invert_cumulative(cumulative, edges).tolist() == [[2, 4, 4]]


def test_a_generator_per_sample_makes_draws_independent_of_the_batch():
    whole = rand(4, 5, generator=sample_generators(1, 2, places=range(4)))
    parts = [rand(1, 5, generator=sample_generators(1, 2, places=[place])) for place in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert len(whole.unique()) == 20


def test_seeds_of_different_keys_differ():
    keys = [(seed, step, place) for seed in range(10) for step in range(10) for place in range(10)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_the_number_of_generators_has_to_fit():
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        rand(3, 1, generator=sample_generators(0, places=range(2)))


def test_draws_have_the_moments_of_a_uniform_distribution():
    draws = rand(4000, 4, generator=sample_generators(0, places=range(4000)))
    assert draws.mean() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 16000))
    assert torch.corrcoef(draws.T).triu(1).abs().max() < 0.08
