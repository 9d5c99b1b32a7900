from itertools import pairwise

import exact
import pytest
import torch

from teachers import (
    ConfidenceThresholdSampler,
    EntropyBoundedSampler,
    FirstHittingSampler,
    HaltonSampler,
    MaskGITSampler,
    PUNTSampler,
    ReMDMSampler,
    SelfCorrectionSampler,
)
from teachers.condition import Condition
from teachers.guidance import GuidedDenoiser
from teachers.randomness import sample_generators
from teachers.samplers.halton import halton_order

NUM_SAMPLES = 10000
# What two draws of this many samples from one distribution of 243 states differ by is about 0.04.
SAMPLING_NOISE = 0.05

ALL_SAMPLERS = [
    MaskGITSampler(4, order="confidence"),
    MaskGITSampler(4, order="random"),
    HaltonSampler((4, 4), 4),
    SelfCorrectionSampler(6, fractions=(0.1, 0.05)),
    SelfCorrectionSampler(6, fractions=(0.1, 0.05), score="leave_one_out"),
    ReMDMSampler(6, eta=0.5),
    ConfidenceThresholdSampler(0.3),
    EntropyBoundedSampler(2.0),
    FirstHittingSampler(),
    PUNTSampler(0.3),
    PUNTSampler(0.3, verify=True),
]


def all_samplers(samplers=ALL_SAMPLERS):
    def name(sampler):
        return type(sampler).__name__ + ("" if sampler is FIRST[type(sampler)] else "-2")

    return pytest.mark.parametrize("sampler", samplers, ids=name)


FIRST = {type(sampler): sampler for sampler in reversed(ALL_SAMPLERS)}


def no_condition(num_samples):
    return Condition(torch.zeros(num_samples, dtype=torch.long))


def masks(num_samples, length, mask_token_id):
    return torch.full((num_samples, length), mask_token_id)


def sample_joint(sampler, num_samples=NUM_SAMPLES):
    """Total variation to the exact joint, and the mean NFE."""
    denoise = GuidedDenoiser(exact.ExactDenoiser(), no_condition(num_samples))
    generator = torch.Generator().manual_seed(0)
    tokens = sampler(denoise, masks(num_samples, exact.LENGTH, 3), 3, generator=generator)
    return exact.total_variation(exact.histogram(tokens), exact.joint()), denoise.nfe.double().mean().item()


def sample_pairs(sampler, num_samples=400, num_pairs=24):
    """Total variation of pairs to their joint, the largest correlation between pairs, and the mean NFE."""
    denoise = GuidedDenoiser(exact.PairDenoiser(), no_condition(num_samples))
    generator = torch.Generator().manual_seed(0)
    tokens = sampler(denoise, masks(num_samples, 2 * num_pairs, 3), 3, generator=generator)
    pairs = tokens.unflatten(-1, (num_pairs, 2))
    frequencies = torch.bincount((3 * pairs[..., 0] + pairs[..., 1]).flatten(), minlength=9) / (num_samples * num_pairs)
    correlation = torch.corrcoef(pairs[..., 0].double().T).triu(1).abs().max().item()
    variation = exact.total_variation(frequencies, exact.PairDenoiser.joint())
    return variation, correlation, denoise.nfe.double().mean().item()


class Recorder(GuidedDenoiser):
    """A denoiser of given logits (L, V) whatever the tokens, which keeps what it was asked."""

    mask_token_id = 9

    def __init__(self, logits, num_samples=1):
        self.seen = []
        self.logits = logits

        def denoiser(tokens, condition):
            self.seen.append(tokens.clone())
            return logits.expand(len(tokens), *logits.shape)

        super().__init__(denoiser, no_condition(num_samples))


# Against a joint distribution that is known exactly


@pytest.mark.parametrize(
    "sampler",
    [
        MaskGITSampler(exact.LENGTH, order="random"),
        HaltonSampler((exact.LENGTH,), exact.LENGTH),
        FirstHittingSampler(),
        EntropyBoundedSampler(0.0),
        ConfidenceThresholdSampler(1.0),
        PUNTSampler(1e-4, verify=True),
    ],
    ids=lambda sampler: type(sampler).__name__,
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


def test_punt_samples_independent_pairs_in_fewer_evaluations_and_parallel_confidence_does_not():
    variation, correlation, nfe = sample_pairs(PUNTSampler(1e-3))
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
        return PUNTSampler(0.1, **settings)(denoise, masks(500, 4, 2), 2, generator=generator), denoise.nfe

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
    PUNTSampler(0.1)(denoise, tokens, 9, generator=torch.Generator().manual_seed(0))
    assert denoise.nfe.tolist() == [most]  # nothing influences anything, so one step does it
    assert len(denoise.seen) == most


def test_samples_that_are_finished_cost_nothing_more():
    """Rows with 16, 2 and no masks: the forwards shrink to those that still have some."""
    denoise = Recorder(torch.zeros(16, 9), num_samples=3)
    tokens = torch.zeros(3, 16, dtype=torch.long)
    tokens[0], tokens[1, :2] = 9, 9
    PUNTSampler(0.1)(denoise, tokens, 9, generator=torch.Generator().manual_seed(0))
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
    sampler(denoise, masks(1, length, 9), 9, generator=torch.Generator().manual_seed(0))
    return [int((tokens != 9).sum()) for tokens in denoise.seen[1:]] + [length]


@pytest.mark.parametrize("token_grid", [(7, 7), (3, 5), (11,), (24, 24)])
def test_the_halton_order_visits_every_position_once(token_grid):
    order = halton_order(token_grid)
    assert sorted(order.tolist()) == list(range(len(order)))


def test_a_rolled_halton_order_starts_elsewhere_for_each_sample():
    denoise = Recorder(torch.zeros(16, 9), num_samples=64)
    generator = torch.Generator().manual_seed(0)
    HaltonSampler((4, 4), 16)(denoise, masks(64, 16, 9), 9, generator=generator)
    first, second = ((denoise.seen[step] != 9).long().argmax(-1) for step in (1, 1))
    assert len(first.unique()) > 12
    order = halton_order((4, 4))
    after_two = denoise.seen[2] != 9
    following = order.roll(-1)[order.argsort()[first]]
    assert after_two[torch.arange(64), following].all()
    assert torch.equal(first, second)


# MaskGIT


def test_confidence_without_noise_reveals_the_most_confident_first():
    """Position 2 is certain, so the only token kept after the first of three steps is there."""
    logits = torch.zeros(3, 4)
    logits[2, 1] = 20
    denoise = Recorder(logits)
    sampler = MaskGITSampler(3, order="confidence", choice_temperature=0.0, schedule="linear")
    sampler(denoise, masks(1, 3, 9), 9, generator=torch.Generator().manual_seed(0))
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
        tokens = sampler(denoise, masks(1, 16, 9), 9, generator=torch.Generator().manual_seed(0))
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
    sampler(denoise, masks(1, 49, 9), 9, generator=torch.Generator().manual_seed(0))
    remasked = sum(int(((now != 9) & (then == 9)).sum()) for now, then in pairwise(denoise.seen))
    assert remasked == 9  # 19 steps of a half, the last step masking none


def test_leaving_out_costs_an_evaluation_for_each_revealed_token():
    denoise = Recorder(torch.zeros(16, 9))
    sampler = SelfCorrectionSampler(4, "linear", window=(0.5, 0.75), fractions=(1 / 16,), score="leave_one_out")
    sampler(denoise, masks(1, 16, 9), 9, generator=torch.Generator().manual_seed(0))
    assert denoise.nfe.tolist() == [4 + 8]


# ReMDM


@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.0), ("cap", 0.3), ("rescale", 0.3), ("rescale", 1.0)])
def test_remasking_keeps_the_expected_share_of_masks(strategy, eta):
    denoise = Recorder(torch.zeros(16, 9), num_samples=2000)
    sampler = ReMDMSampler(8, schedule="linear", strategy=strategy, eta=eta)
    tokens = sampler(denoise, masks(2000, 16, 9), 9, generator=torch.Generator().manual_seed(0))
    shares = [(seen == 9).double().mean().item() for seen in denoise.seen]
    assert shares == pytest.approx([1 - step / 8 for step in range(8)], abs=0.02)
    assert (tokens != 9).all()
    pairs = pairwise(denoise.seen)
    assert any(((now != 9) & (then == 9)).any() for now, then in pairs) == (eta > 0)


# All


@all_samplers()
def test_a_batch_equals_its_samples_one_by_one(teacher, sampler):
    teacher.sampler = sampler
    teacher.register_to_config(temperature=0.7, guidance_scale=1.5)
    labels = [1, 5, 9]
    whole = teacher(labels, generator=sample_generators(0, places=range(3)), output_type="tokens")
    alone = [
        teacher([label], generator=sample_generators(0, places=[place]), output_type="tokens")
        for place, label in enumerate(labels)
    ]
    assert torch.equal(whole.tokens, torch.cat([one.tokens for one in alone]))
    assert whole.nfe == pytest.approx(sum(one.nfe for one in alone) / 3)
    assert len(whole.tokens.unique(dim=0)) == 3


@all_samplers()
def test_greedy_tokens_need_no_generator(teacher, sampler):
    teacher.sampler = sampler
    tokens = teacher([1, 5], temperature=0.0, output_type="tokens").tokens
    assert (tokens < teacher.mask_token_id).all()


@all_samplers()
def test_evaluations_are_counted(teacher, sampler):
    rows = []
    teacher.denoiser.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    teacher.sampler = sampler
    assert teacher([0, 1, 2], guidance_scale=2.0, output_type="tokens").nfe == pytest.approx(sum(rows) / 3)


@all_samplers()
def test_known_tokens_stay_and_samples_with_fewer_masks_are_finished_too(teacher, sampler):
    known = torch.randint(0, 16, (3, 16))
    known[0, ::2], known[1, 3] = 16, 16
    condition = teacher.encode_condition([1, 2, 3])
    with torch.no_grad():
        denoise = GuidedDenoiser(teacher.denoiser, condition)
        tokens = sampler(denoise, known, 16, generator=torch.Generator().manual_seed(0))
    assert (tokens != 16).all()
    assert torch.equal(tokens[known != 16], known[known != 16])


@all_samplers()
def test_blocks_are_filled_in_from_left_to_right(sampler):
    denoise = Recorder(torch.randn(16, 9, generator=torch.Generator().manual_seed(0)), num_samples=2)
    tokens = masks(2, 16, 9)
    tokens[0, :3] = 0  # a prompt, after which the blocks are 3 to 7, 8 to 12 and 13 to 15
    filled = sampler(denoise, tokens, 9, block_length=5, generator=torch.Generator().manual_seed(0))
    assert (filled != 9).all()
    for seen in denoise.seen:
        if len(seen) == 2:
            masked = seen[0] == 9
            begun = ~masked[8:].all()
            assert not (begun and masked[3:8].any())


@all_samplers()
def test_a_sampler_is_saved_with_its_pipeline(teacher, sampler, tmp_path):
    teacher.sampler = sampler
    teacher.register_modules(sampler=sampler)
    teacher.register_to_config(guidance_scale=1.5, temperature=0.7)
    teacher.save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    assert type(loaded.sampler) is type(sampler)
    tokens = [
        pipe([3, 7], generator=torch.Generator().manual_seed(1), output_type="tokens").tokens
        for pipe in (teacher, loaded)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskGITSampler(order="halton"), "order='halton'"),
        (lambda: MaskGITSampler(schedule="sine"), "schedule='sine'"),
        (lambda: HaltonSampler((4, 4), schedule="sine"), "schedule='sine'"),
        (lambda: PUNTSampler(0.0), "epsilon=0.0 must be more than 0"),
        (lambda: PUNTSampler(-1.0), "epsilon=-1.0 must be more than 0"),
        (lambda: EntropyBoundedSampler(-0.1), "entropy_bound=-0.1"),
        (lambda: ConfidenceThresholdSampler(1.5), "threshold=1.5"),
        (lambda: ConfidenceThresholdSampler(0.0), "threshold=0.0"),
        (lambda: SelfCorrectionSampler(window=(-0.1, 0.5)), "window's start=-0.1"),
        (lambda: SelfCorrectionSampler(window=(0.5, 1.2)), "window's end=1.2"),
        (lambda: SelfCorrectionSampler(window=(0.5, 0.5)), "window's end=0.5 must be more than 0.5"),
        (lambda: SelfCorrectionSampler(fractions=(2.0,)), "fraction=2.0"),
        (lambda: SelfCorrectionSampler(fractions=()), "at least one part"),
        (lambda: SelfCorrectionSampler(score="best"), "score='best'"),
        (lambda: ReMDMSampler(eta=1.1), "eta=1.1"),
        (lambda: ReMDMSampler(strategy="loop"), "strategy='loop'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_and_lengths_that_do_not_fit_are_refused(teacher):
    for sampler, settings, message in [
        (MaskGITSampler(), {"num_inference_steps": 17}, "num_inference_steps=17 must be between 1 and 16"),
        (HaltonSampler((4, 4)), {}, "num_inference_steps=32 must be between 1 and 16"),
        (SelfCorrectionSampler(), {"num_inference_steps": 0}, "num_inference_steps=0"),
        (ReMDMSampler(), {"num_inference_steps": 0}, "num_inference_steps=0"),
        (PUNTSampler(), {"num_inference_steps": 8}, "leave out num_inference_steps"),
        (HaltonSampler((3, 5), 8), {}, "grid of .* got 16 tokens"),
    ]:
        teacher.sampler = sampler
        with pytest.raises(ValueError, match=message):
            teacher([0], **settings)
