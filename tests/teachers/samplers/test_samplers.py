import pytest
import torch
from recorder import Recorder, masks

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
from teachers.guidance import GuidedDenoiser
from teachers.randomness import sample_generators
from teachers.samplers.sampler import AdaptiveSampler

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
    PUNTSampler(0.3, verify=True, order="random"),
]


def all_samplers(samplers=ALL_SAMPLERS):
    def name(sampler):
        return type(sampler).__name__ + ("" if sampler is FIRST[type(sampler)] else "-2")

    return pytest.mark.parametrize("sampler", samplers, ids=name)


FIRST = {type(sampler): sampler for sampler in reversed(ALL_SAMPLERS)}


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
        tokens = sampler(denoise, known, generator=torch.Generator().manual_seed(0))
    assert (tokens != 16).all()
    assert torch.equal(tokens[known != 16], known[known != 16])


@all_samplers()
def test_each_step_ends_where_tokens_may_be_put_in_the_place_of_others(teacher, sampler):
    """A callback keeps one position as it wants it, and hides all others again after the first step."""
    teacher.sampler = sampler
    inputs, lefts = [], []
    teacher.denoiser.register_forward_hook(lambda module, arguments, logits: inputs.append(arguments[0]))

    def callback(pipe, step, left, tensors):
        lefts.append(left)
        chosen = tensors["latents"].masked_fill(torch.tensor(step == 0), 16)
        chosen[:, 5] = 9
        return {"latents": chosen}

    tokens = teacher([1, 5, 9], callback_on_step_end=callback, output_type="tokens").tokens
    assert (tokens < 16).all()
    assert (tokens[:, 5] == 9).all()
    first = next(number for number, seen in enumerate(inputs) if (seen[:, 5] == 9).all())
    assert any((seen[:, :5] == 16).all() for seen in inputs[first:])  # the network has seen what the callback chose
    assert lefts[-1] == 0
    if not isinstance(sampler, AdaptiveSampler):
        num_steps = sampler.num_steps(None, 16)
        assert lefts == list(reversed(range(num_steps)))


@all_samplers()
def test_blocks_are_filled_in_from_left_to_right(sampler):
    denoise = Recorder(torch.randn(16, 9, generator=torch.Generator().manual_seed(0)), num_samples=2)
    tokens = masks(denoise, 16)
    tokens[0, :3] = 0  # a prompt, after which the blocks are 3 to 7, 8 to 12 and 13 to 15
    filled = sampler(denoise, tokens, block_length=5, generator=torch.Generator().manual_seed(0))
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
        (lambda: PUNTSampler(order="halton"), "order='halton'"),
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
        (MaskGITSampler(), {"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be .*whole"),
        (ReMDMSampler(), {"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be .*whole"),
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
