"""Completing and changing images, with teachers and students."""

import numpy as np
import pytest
import torch
from PIL import Image

from students import OneStepPipeline, TokenInitialiser
from teachers.inpainting import forget, hide, read_images, read_incomplete
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


@pytest.mark.parametrize(
    "kind", ["Pillow", "whole numbers", "arrays", "whole arrays", "a list of them", "True and False"]
)
def test_images_and_masks_of_any_kind(pipeline, digits, kind):
    pixels, mask = (digits[:2] * 255).round().byte(), (RIGHT_HALF * 255).byte()
    images, masks = {
        "Pillow": ([Image.fromarray(image[0].numpy()) for image in pixels], Image.fromarray(mask[0, 0].numpy())),
        "whole numbers": (pixels, mask),
        "arrays": ((pixels / 255).permute(0, 2, 3, 1).numpy(), RIGHT_HALF.permute(0, 2, 3, 1).numpy()),
        "whole arrays": (pixels.permute(0, 2, 3, 1).numpy(), mask[0, 0].numpy()),
        "a list of them": ([image[0].numpy() for image in pixels], [mask[0, 0].numpy() > 0] * 2),
        "True and False": (pixels / 255, RIGHT_HALF.bool()),
    }[kind]
    settings = {"class_labels": [3, 4], "output_type": "tokens"}
    expected = pipeline.inpaint(pixels / 255, RIGHT_HALF, generator=seeded(2), **settings).tokens
    assert torch.equal(pipeline.inpaint(images, masks, generator=seeded(2), **settings).tokens, expected)


def test_images_of_another_size_are_resized(pipeline, digits):
    larger = digits[:2].repeat_interleave(4, 2).repeat_interleave(4, 3)
    mask = RIGHT_HALF.repeat_interleave(64, 2).repeat_interleave(64, 3)
    tokens = pipeline.inpaint(larger, mask, class_labels=[3, 4], output_type="tokens").tokens
    same = (tokens == pipeline.encode(digits[:2])).view(2, 4, 4)[..., :2]
    assert same.float().mean() > 0.7  # pixels at the edge take something of what is hidden in their colours


@pytest.mark.parametrize("size", [8, 32, 512])
def test_a_single_pixel_of_a_mask_makes_its_token_new_and_is_not_looked_at(size):
    mask = torch.zeros(1, size, size)
    mask[0, 3 * size // 8, 5 * size // 8] = 1
    image = torch.full((1, size, size), 0.5)
    image[mask > 0] = 1
    pixels, is_new = read_incomplete(image, mask, (1, 8, 8), (4, 4))
    assert is_new.view(4, 4).nonzero().tolist() == [[1, 2]]
    torch.testing.assert_close(pixels, torch.full((1, 1, 8, 8), 0.5))


@pytest.mark.parametrize(
    "wrong",
    [torch.full((1, 8, 8), 1.5), torch.full((1, 8, 8), -0.1), torch.full((1, 8, 8), torch.nan), "photo.png", []],
)
def test_what_is_no_image_is_refused(pipeline, wrong):
    with pytest.raises(ValueError, match=r"image|numbers"):
        pipeline.image_to_image(wrong, class_labels=[1])


def test_counts_that_do_not_fit_are_named(pipeline, digits):
    with pytest.raises(ValueError, match="2 images and 3 masks"):
        pipeline.inpaint(digits[:2], RIGHT_HALF.expand(3, -1, -1, -1), class_labels=[1, 2])
    with pytest.raises(ValueError, match="3 images"):
        pipeline.inpaint(digits[:3], RIGHT_HALF, class_labels=1)


def test_sixteen_bits_and_transparency_of_masks():
    image = torch.zeros(1, 8, 8)
    nearly_black = Image.fromarray(np.full((8, 8), 400, np.uint16))
    assert not read_incomplete(image, nearly_black, (1, 8, 8), (4, 4))[1].any()
    transparent = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_incomplete(image, transparent, (1, 8, 8), (4, 4))[1].all()


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


def test_a_token_that_a_mask_cuts_is_new():
    mask = torch.zeros(1, 28, 28, dtype=torch.bool)
    mask[..., 14:] = True  # half of the fourth of seven columns
    _, is_new = read_incomplete(torch.zeros(1, 28, 28), mask, (1, 28, 28), (7, 7))
    assert is_new.view(7, 7).any(0).tolist() == [False] * 3 + [True] * 4


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 13)])
def test_what_is_hidden_has_the_colours_around_it_and_nothing_of_its_own(shape):
    mask = torch.zeros(1, *shape[1:], dtype=torch.bool)
    mask[..., 3:6] = True
    image = torch.rand(shape)
    hidden = hide(image, mask)
    assert torch.equal(hidden[~mask.expand(shape)], image[~mask.expand(shape)])
    assert image.min() <= hidden.min() <= hidden.max() <= image.max()
    assert torch.equal(hide(torch.where(mask, torch.rand(shape), image), mask), hidden)
    evenly = torch.full(shape, 0.3)
    torch.testing.assert_close(hide(torch.where(mask, 1.0, evenly), mask), evenly)
    assert (hide(image, torch.ones_like(mask)) == 0).all()
    assert torch.equal(hide(image, torch.zeros_like(mask)), image)


def test_images_in_colour_become_grey_for_a_model_of_grey_ones():
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 10, 3), dtype=np.uint8))
    assert read_images(colours, (1, 8, 8)).shape == (1, 1, 8, 8)
    assert read_images(colours, (3, 8, 8)).shape == (1, 3, 8, 8)
    assert read_images(colours.convert("L"), (3, 8, 8)).shape == (1, 3, 8, 8)
    assert read_images(torch.rand(2, 3, 8, 8), (1, 8, 8)).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="channels"):
        read_images(torch.rand(2, 2, 8, 8), (3, 8, 8))


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
