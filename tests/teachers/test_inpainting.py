"""Completing and changing images, with teachers and students."""

import numpy as np
import pytest
import torch
from PIL import Image

from students import OneStepPipeline, TokenInitialiser
from teachers.inpainting import forget, hide, read_images, read_masks, tokens_under
from teachers.randomness import sample_generators

RIGHT_HALF = torch.zeros(1, 1, 8, 8)
RIGHT_HALF[..., 4:] = 1


@pytest.fixture(params=["teacher", "student"])
def pipeline(request, teacher):
    if request.param == "teacher":
        return teacher
    initialiser = TokenInitialiser.for_teacher(teacher, known_tokens=0.5)
    return OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser)


def seeded(count, seed=0):
    return sample_generators(seed, places=range(count))


def test_what_is_known_stays_and_the_rest_is_new(pipeline, digits):
    images = digits[:5]
    output = pipeline.inpaint(images, RIGHT_HALF, class_labels=[1] * 5, generator=seeded(5), output_type="pt")
    columns, own = output.tokens.view(5, 4, 4), pipeline.encode(images).view(5, 4, 4)
    assert torch.equal(columns[..., :2], own[..., :2])
    assert not torch.equal(columns[..., 2:], own[..., 2:])
    again = pipeline.inpaint(images, RIGHT_HALF, class_labels=[1] * 5, generator=seeded(5, 1), output_type="pt")
    assert not torch.equal(again.tokens, output.tokens)


def test_what_lies_under_the_mask_is_not_looked_at(pipeline, digits):
    other = digits[:5].clone()
    other[..., 4:] = torch.rand(5, 1, 8, 4)
    made = [
        pipeline.inpaint(images, RIGHT_HALF, class_labels=[1] * 5, generator=seeded(5), output_type="tokens").tokens
        for images in (digits[:5], other)
    ]
    assert torch.equal(*made)


def test_images_and_masks_of_any_kind(pipeline, digits):
    pixels = (digits[:2] * 255).byte()
    kinds = {
        "tensors": (pixels / 255, RIGHT_HALF),
        "Pillow": (
            [Image.fromarray(image[0].numpy()) for image in pixels],
            Image.fromarray((RIGHT_HALF[0, 0] * 255).byte().numpy()),
        ),
        "larger ones": (
            [Image.fromarray(image[0].repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()) for image in pixels],
            Image.fromarray((RIGHT_HALF[0, 0] * 255).byte().numpy()).resize((32, 32), Image.Resampling.NEAREST),
        ),
        "True and False": (pixels / 255, RIGHT_HALF.bool()),
        "arrays": ((pixels / 255).permute(0, 2, 3, 1).numpy(), RIGHT_HALF.permute(0, 2, 3, 1).numpy()),
    }
    made = {
        kind: pipeline.inpaint(*given, class_labels=[3, 4], generator=seeded(2), output_type="tokens").tokens
        for kind, given in kinds.items()
    }
    for kind, tokens in made.items():
        same = (tokens == made["tensors"]).float().mean()
        assert same == 1 if kind != "larger ones" else same > 0.6  # made smaller again, edges differ


def test_one_image_may_be_completed_in_many_ways(pipeline, digits):
    output = pipeline.inpaint(
        digits[:1], RIGHT_HALF, class_labels=[1, 2, 3], num_images_per_prompt=2, generator=seeded(6), output_type="pt"
    )
    columns = output.tokens.view(6, 4, 4)
    assert (columns[..., :2] == columns[:1, :, :2]).all()
    assert len(columns.flatten(1).unique(dim=0)) == 6


def test_the_strength_is_the_share_of_new_tokens(pipeline, digits):
    images = digits[:20]
    for strength, most in [(0.25, 4), (0.5, 8), (1.0, 16)]:
        tokens = pipeline.image_to_image(
            images, class_labels=[1] * 20, strength=strength, generator=seeded(20), output_type="tokens"
        ).tokens
        changed = (tokens != pipeline.encode(images)).sum(-1)
        assert changed.max() <= most
        assert changed.float().mean() > 0.5 * most


def test_the_share_to_forget_is_exact(teacher):
    tokens = torch.randint(0, 16, (50, 16))
    known = forget(tokens, 0.25, 16, seeded(50))
    assert ((known == 16).sum(-1) == 4).all()
    assert torch.equal(known[known != 16], tokens[known != 16])


@pytest.mark.parametrize("strength", [0, -0.5, 1.5])
def test_a_strength_that_is_none(pipeline, digits, strength):
    with pytest.raises(ValueError, match="strength"):
        pipeline.image_to_image(digits[:1], class_labels=[1], strength=strength)


def test_a_token_is_new_where_any_pixel_of_it_is_masked():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 3, 5] = True
    assert tokens_under(mask, (4, 4)).view(4, 4).nonzero().tolist() == [[1, 2]]
    mask = torch.zeros(1, 1, 28, 28, dtype=torch.bool)
    mask[..., 14:] = True  # half of the fourth of seven columns
    assert tokens_under(mask, (7, 7)).view(7, 7).any(0).tolist() == [False] * 3 + [True] * 4


def test_what_is_hidden_has_the_mean_of_what_is_not():
    images, mask = torch.rand(3, 3, 8, 8), RIGHT_HALF.bool()
    hidden = hide(images, mask)
    assert torch.equal(hidden[..., :4], images[..., :4])
    torch.testing.assert_close(hidden[..., 4:], images[..., :4].mean((2, 3), keepdim=True).expand(3, 3, 8, 4))
    assert hide(images, torch.ones_like(mask)).isfinite().all()


def test_images_in_colour_become_grey_for_a_model_of_grey_ones():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8))
    assert read_images(colours, (1, 8, 8)).shape == (1, 1, 8, 8)
    assert read_images(colours, (3, 8, 8)).shape == (1, 3, 8, 8)
    assert read_images(colours.convert("L"), (3, 8, 8)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="channels"):
        read_images(torch.rand(2, 3, 8, 8), (1, 8, 8))
    assert read_masks(colours, (3, 8, 8)).dtype == torch.bool


def test_a_student_for_whole_images_says_so(teacher, digits, caplog):
    student = OneStepPipeline(teacher.denoiser, teacher.tokenizer, TokenInitialiser.for_teacher(teacher))
    student(class_labels=[1])
    assert not caplog.records
    student.inpaint(digits[:1], RIGHT_HALF, class_labels=[1])
    assert "known_tokens" in caplog.text


def test_an_unconditional_model_makes_one_for_each_image(digits, teacher):
    from teachers import MaskedDiffusionPipeline, MaskGITSampler, MaskGITTransformer

    network = MaskGITTransformer(16, 0, (4, 4), hidden_size=16, num_layers=1, num_attention_heads=2, mlp_size=32)
    pipeline = MaskedDiffusionPipeline(network.eval(), teacher.tokenizer, MaskGITSampler(num_inference_steps=2))
    assert len(pipeline.inpaint(digits[:3], RIGHT_HALF).images) == 3
    assert len(pipeline.image_to_image(digits[:3]).images) == 3
