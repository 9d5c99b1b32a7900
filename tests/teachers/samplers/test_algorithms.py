from itertools import pairwise

import pytest
import torch
from recorder import Recorder, masks, no_condition

from teachers import (
    HaltonSampler,
    MaskGITSampler,
    PUNTSampler,
    ReMDMSampler,
    SelfCorrectionSampler,
)
from teachers.guidance import GuidedDenoiser
from teachers.samplers.halton import halton_order

# PUNT


class ParityDenoiser:
    """Four fair bits, of which the last three have even parity: each pair is independent, all three are not."""

    mask_token_id = 2

    def __call__(self, tokens, condition):
        ones = torch.zeros(*tokens.shape, 2)
        ones[:, 0, 0] = 1e-3  # the surest, so that the others have ranks 1 to 3
        for place in (1, 2, 3):
            others = tokens[:, [other for other in (1, 2, 3) if other != place]]
            known = (others != 2).all(-1)
            ones[known, place, 1 - others[known].sum(-1) % 2] = -torch.inf
        return ones


def even(tokens):
    return (tokens[:, 1:].sum(-1) % 2 == 0).double().mean().item()


def test_the_tests_of_punt_miss_a_joint_influence_and_verification_sees_it():
    def sample(**settings):
        denoise = GuidedDenoiser(ParityDenoiser(), no_condition(500))
        generator = torch.Generator().manual_seed(0)
        return PUNTSampler(0.1, **settings)(denoise, masks(denoise, 4), generator=generator), denoise.nfe

    tokens, nfe = sample()
    assert even(tokens) == pytest.approx(0.5, abs=0.1)  # all four kept at once: 1 + ceil(log2 4) evaluations
    assert (nfe == 3).all()
    tokens, nfe = sample(verify=True)
    assert even(tokens) == 1
    assert (nfe == 3 + 3 + 1).all()  # a verification for each kept token but one; the one that failed is drawn again


@pytest.mark.parametrize(("num_masked", "most"), [(1, 1), (2, 2), (3, 3), (5, 4), (16, 5)])
def test_a_punt_step_costs_one_evaluation_and_a_round_for_each_bit_of_the_rank(num_masked, most):
    denoise = Recorder(torch.zeros(16, 9))
    tokens = torch.zeros(1, 16, dtype=torch.long)
    tokens[:, :num_masked] = 9
    PUNTSampler(0.1)(denoise, tokens, generator=torch.Generator().manual_seed(0))
    assert denoise.nfe.tolist() == [most]  # nothing influences anything, so one step does it
    assert len(denoise.seen) == most


def test_samples_that_are_finished_cost_nothing_more():
    """Rows with 16, 2 and no masks: the forwards shrink to those that still have some."""
    denoise = Recorder(torch.zeros(16, 9), num_samples=3)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    tokens[0], tokens[1, :2] = 9, 9
    PUNTSampler(0.1)(denoise, tokens, generator=torch.Generator().manual_seed(0))
    assert denoise.nfe.tolist() == [5, 2, 0]
    assert [len(tokens) for tokens in denoise.seen] == [2, 1, 1, 1, 2]


# Halton


def test_the_halton_order_is_the_authors(shared):
    from safetensors.torch import load_file

    expected = load_file(shared / "golden" / "halton" / "expected.safetensors")
    row, column = expected["halton_order_row_column"].T
    assert torch.equal(halton_order((4, 4)), row * 4 + column)
    revealed = revealed_after_each_step(HaltonSampler((4, 4), 8, roll=False))
    assert revealed == expected["halton_revealed_after_step_of_8"].tolist()


def revealed_after_each_step(sampler, length=16):
    denoise = Recorder(torch.zeros(length, 9))
    sampler(denoise, masks(denoise, length), generator=torch.Generator().manual_seed(0))
    return [int((tokens != 9).sum()) for tokens in denoise.seen[1:]] + [length]


@pytest.mark.parametrize("token_grid", [(7, 7), (3, 5), (11,), (24, 24)])
def test_the_halton_order_visits_every_position_once(token_grid):
    order = halton_order(token_grid)
    assert sorted(order.tolist()) == list(range(len(order)))


def test_a_rolled_halton_order_starts_elsewhere_for_each_sample():
    denoise = Recorder(torch.zeros(16, 9), num_samples=64)
    generator = torch.Generator().manual_seed(0)
    HaltonSampler((4, 4), 16)(denoise, masks(denoise, 16), generator=generator)
    first = (denoise.seen[1] != 9).long().argmax(-1)
    assert len(first.unique()) > 12
    order = halton_order((4, 4))
    after_two = denoise.seen[2] != 9
    following = order.roll(-1)[order.argsort()[first]]
    assert after_two[torch.arange(64), following].all()


# MaskGIT


def test_confidence_without_noise_reveals_the_most_confident_first():
    """Position 2 is certain, so the only token kept after the first of three steps is there."""
    logits = torch.zeros(3, 4)
    logits[2, 1] = 20
    denoise = Recorder(logits)
    sampler = MaskGITSampler(3, order="confidence", choice_temperature=0.0, schedule="linear")
    sampler(denoise, masks(denoise, 3), generator=torch.Generator().manual_seed(0))
    assert denoise.seen[1].tolist() == [[9, 9, 1]]


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("schedule", ["arccos", "cosine", "linear", "square"])
def test_every_step_reveals_and_none_is_left(order, schedule):
    revealed = revealed_after_each_step(MaskGITSampler(7, order=order, schedule=schedule))
    assert len(revealed) == 7
    assert (torch.tensor([0, *revealed]).diff() > 0).all()


# Self-correction


def test_self_correction_masks_the_doubted_token_again_and_keeps_to_the_schedule():
    """The denoiser takes back what it said of position 0 as soon as that is revealed, and is sure of all else."""
    plain = MaskGITSampler(8, choice_temperature=0.0, schedule="linear")
    correcting = SelfCorrectionSampler(8, "linear", 0.0, window=(0.4, 1.0), fractions=(1 / 16,))
    logits = torch.zeros(16, 9)
    logits[:, 1] = 10
    logits[0, 1] = 20

    def sample(sampler):
        denoise = Recorder(logits)
        denoiser = denoise.denoiser

        def changing_its_mind(tokens, condition):
            answer = denoiser(tokens, condition).clone()
            answer[tokens[:, 0] != 9, 0] = torch.eye(9)[5] * 20
            return answer

        denoise.denoiser = changing_its_mind
        tokens = sampler(denoise, masks(denoise, 16), generator=torch.Generator().manual_seed(0))
        return denoise.seen, tokens

    seen, tokens = sample(correcting)
    plainly, _ = sample(plain)
    assert [int((t == 9).sum()) for t in seen] == [int((t == 9).sum()) for t in plainly]
    assert [bool(t[0, 0] == 9) for t in plainly] == [True] + 7 * [False]
    # The window opens in step 4 (4 / 8 >= 0.4); a token masked there can be drawn again in the step after.
    assert [bool(t[0, 0] == 9) for t in seen] == [True, False, False, False, False, True, False, True]
    assert (tokens != 9).all()


def test_fractions_of_a_token_add_up_over_the_steps():
    denoise = Recorder(torch.zeros(49, 9))
    sampler = SelfCorrectionSampler(20, "linear", window=(0.0, 1.0), fractions=(1 / 98,))  # half a token a step
    sampler(denoise, masks(denoise, 49), generator=torch.Generator().manual_seed(0))
    remasked = sum(int(((now != 9) & (then == 9)).sum()) for now, then in pairwise(denoise.seen))
    assert remasked == 9  # 19 steps of a half, the last step masking none


def test_leaving_out_costs_an_evaluation_for_each_revealed_token():
    denoise = Recorder(torch.zeros(16, 9))
    sampler = SelfCorrectionSampler(4, "linear", window=(0.5, 0.75), fractions=(1 / 16,), score="leave_one_out")
    sampler(denoise, masks(denoise, 16), generator=torch.Generator().manual_seed(0))
    assert denoise.nfe.tolist() == [4 + 8]


# ReMDM


@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.0), ("cap", 0.3), ("rescale", 0.3), ("rescale", 1.0)])
def test_remasking_keeps_the_expected_share_of_masks(strategy, eta):
    denoise = Recorder(torch.zeros(16, 9), num_samples=2000)
    sampler = ReMDMSampler(8, schedule="linear", strategy=strategy, eta=eta)
    tokens = sampler(denoise, masks(denoise, 16), generator=torch.Generator().manual_seed(0))
    shares = [(seen == 9).double().mean().item() for seen in denoise.seen]
    assert shares == pytest.approx([1 - step / 8 for step in range(8)], abs=0.02)
    assert (tokens != 9).all()
    pairs = pairwise(denoise.seen)
    assert any(((now != 9) & (then == 9)).any() for now, then in pairs) == (eta > 0)
