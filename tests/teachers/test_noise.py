"""Noise worked out from a seed and a place."""

import math

import torch

from teachers.randomness import noise, sample_generators, split_mix


def test_the_numbers_are_those_of_splitmix64():
    """The first ones of seed 1234567, as its authors' program prints them."""
    bits = split_mix(torch.tensor([[1234567]]), torch.arange(1, 6))
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [number % 2**64 for number in bits[0].tolist()] == expected


def test_it_is_standard_normal():
    drawn = noise(40, 50, 101, generator=sample_generators(0, places=range(40))).double()
    count = drawn.numel()
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(drawn.pow(power).mean() - expected) < 4 * math.sqrt(variance / count)
    for bound in (-2.0, -0.5, 0.0, 1.0, 2.5):
        share = 0.5 * (1 + math.erf(bound / math.sqrt(2)))
        assert abs((drawn < bound).double().mean() - share) < 4 * math.sqrt(share * (1 - share) / count)
    flat = drawn.flatten(1)
    for lag in (1, 50, 2525):  # neighbours, rows, and the two numbers that come from the same bits
        assert abs((flat[:, lag:] * flat[:, :-lag]).mean()) < 4 / math.sqrt(count)
    correlation = flat @ flat.T / flat.shape[1] - torch.eye(40)
    assert correlation.fill_diagonal_(0).abs().max() < 5 / math.sqrt(flat.shape[1])


def test_a_sample_s_noise_is_its_own_and_other_sizes_begin_alike():
    whole = noise(5, 8, 6, generator=sample_generators(0, places=range(5)))
    alone = noise(1, 8, 6, generator=sample_generators(0, places=[3]))
    assert torch.equal(whole[3:4], alone)
    again = sample_generators(0, places=range(5))
    assert not torch.equal(noise(5, 8, 6, generator=again), noise(5, 8, 6, generator=again))
    shared = noise(5, 8, 6, generator=torch.Generator().manual_seed(0))
    assert shared.shape == (5, 8, 6)
    assert len(shared.unique()) == 240
