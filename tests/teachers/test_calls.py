"""What users of diffusers type, of teachers and students alike."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_text import amused_folder

from students import OneStepPipeline, TokenInitialiser
from teachers import MaskedDiffusionPipeline
from teachers.randomness import sample_generators

ANIMALS = ["cat", "dog", "cow", "hen", "crane", "pig", "crane", "ewe", "3", "10"]


def student_of(teacher, **settings):
    initialiser = TokenInitialiser.for_teacher(teacher, embedding_noise=0.1)
    parts = teacher.denoiser, teacher.tokenizer, initialiser, teacher.text_encoder, teacher.text_tokenizer
    return OneStepPipeline(*parts, **settings)


@pytest.fixture(params=["teacher", "student"])
def pipe(request, teacher):
    return teacher if request.param == "teacher" else student_of(teacher)


@pytest.fixture(scope="module")
def text_teacher(tmp_path_factory):
    return MaskedDiffusionPipeline.from_pretrained(amused_folder(tmp_path_factory.mktemp("amused") / "teacher"))


def tokens(pipe, *arguments, count, places=None, **settings):
    generator = sample_generators(0, places=range(count) if places is None else places)
    return pipe(*arguments, generator=generator, output_type="tokens", **settings).tokens


WRONG = [
    ("temperature", -1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_k", 2.5),
    ("top_p", 0), ("top_p", 1.5), ("top_p", float("nan")), ("output_type", "jpeg"), ("generator", 0),
    ("generator", [0]), ("generator", [None]), ("num_images_per_prompt", 0), ("num_images_per_prompt", 1.5),
    ("guidance_scale", float("nan")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_makes_no_sense_is_refused_before_anything_is_computed(pipe, name, value):
    calls = []
    pipe.denoiser.register_forward_hook(lambda *arguments: calls.append(arguments))
    with pytest.raises(ValueError, match=name):
        pipe([3], **{name: value})
    assert not calls


def test_a_saved_setting_that_makes_no_sense_is_refused_too(teacher):
    teacher.register_to_config(top_p=0.0)
    with pytest.raises(ValueError, match=r"top_p=0\.0"):
        teacher([3])
    teacher([3], top_p=1.0)


def test_top_k_of_a_teacher_s_call(teacher):
    greedy = tokens(teacher, [3, 7], count=2, temperature=0)
    assert torch.equal(tokens(teacher, [3, 7], count=2, top_k=1), greedy)
    assert torch.equal(tokens(teacher, [3, 7], count=2, top_p=1e-9), greedy)


ONE = [torch.tensor(3), np.int64(3), np.array(3), [np.uint8(3)], [torch.tensor(3)]]
TWO = [(3, 7), torch.tensor([3, 7], dtype=torch.uint8), np.array([3, 7]), range(3, 8, 4), (torch.tensor(3), np.int8(7))]


@pytest.mark.parametrize("labels", ONE + TWO, ids=repr)
def test_labels_in_whatever_holds_them(pipe, labels):
    count = 1 if any(labels is one for one in ONE) else 2
    expected = tokens(pipe, [3, 7][:count], count=count)
    assert torch.equal(tokens(pipe, class_labels=labels, count=count), expected)


@pytest.mark.parametrize("labels", [torch.tensor([[3]]), [3, None], np.array([2.0]), 3.5, {}, [10], np.int64(-1)])
def test_labels_that_are_none(pipe, labels):
    with pytest.raises(ValueError, match="class label"):
        pipe(class_labels=labels)


def test_generators_in_a_tuple(pipe):
    several = sample_generators(0, places=range(2))
    again = tuple(sample_generators(0, places=range(2)))
    assert torch.equal(pipe([3, 7], generator=several).tokens, pipe([3, 7], generator=again).tokens)


def test_images_of_a_prompt_lie_beside_each_other(pipe):
    expected = tokens(pipe, [3, 3, 3, 7, 7, 7], count=6)
    assert torch.equal(tokens(pipe, [3, 7], num_images_per_prompt=3, count=6), expected)
    condition = pipe.encode_condition([3, 7])
    assert torch.equal(tokens(pipe, condition=condition, num_images_per_prompt=3, count=6), expected)


def test_latents_are_the_codebook_s_vectors(pipe, text_teacher):
    output = pipe([3, 7], generator=torch.Generator().manual_seed(0), output_type="latent")
    assert output.images.shape == (2, 4, 4, 4)
    images = F.pixel_shuffle(output.images, 2).clamp(0, 1)
    assert torch.equal(images, pipe.decode(output.tokens))
    output = text_teacher("house", num_inference_steps=2, output_type="latent")
    assert output.images.shape == (1, 4, 4, 4)
    rendered = text_teacher.tokenizer.render(output.images.flatten(2).transpose(1, 2)).clamp(0, 1)
    torch.testing.assert_close(rendered, text_teacher.decode(output.tokens))


def test_known_tokens_stay(teacher):
    known = torch.full((2, 16), 16)
    known[0, :8], known[1, 3] = 5, 9
    found = tokens(teacher, [3, 7], latents=known, count=2)
    assert (found < 16).all()
    assert torch.equal(found[known < 16], known[known < 16])
    assert torch.equal(tokens(teacher, [3, 7], latents=known.view(2, 4, 4), count=2), found)
    assert torch.equal(
        tokens(teacher, [3, 7], latents=torch.full((1, 16), 16), count=2), tokens(teacher, [3, 7], count=2)
    )
    each = tokens(teacher, [3, 7], num_images_per_prompt=2, latents=known, count=4)
    assert torch.equal(each, tokens(teacher, [3, 3, 7, 7], latents=known[[0, 0, 1, 1]], count=4))
    for wrong in (known[:, :8], torch.full((3, 16), 16), torch.full((2, 16), 17), torch.full((2, 16), 0.5), known[:0]):
        with pytest.raises(ValueError, match=r"tokens must be|to go on from"):
            teacher([3, 7], latents=wrong)


# Text


def test_a_negative_prompt_for_each_prompt(text_teacher):
    prompts, negatives = ["house", "a red apple"], ["a green car", "smiling face"]
    settings = {"guidance_scale": 3.0, "num_inference_steps": 3}
    whole = tokens(text_teacher, prompts, negative_prompt=negatives, count=2, **settings)
    for place in range(2):
        one = {"negative_prompt": negatives[place], "count": 1, "places": [place], **settings}
        assert torch.equal(tokens(text_teacher, prompts[place], **one), whole[place : place + 1])
    assert not torch.equal(whole, tokens(text_teacher, prompts, negative_prompt=negatives[::-1], count=2, **settings))
    for wrong in (["house"], [], ["house", None], ["house"] * 3):
        with pytest.raises(ValueError, match="negative_prompt"):
            text_teacher(prompts, negative_prompt=wrong)


def embeddings(pipe, prompts, prefix=""):
    condition = pipe.encode_condition(prompts)
    return {f"{prefix}prompt_embeds": condition.pooled, f"{prefix}encoder_hidden_states": condition.states}


def test_embeddings_in_place_of_prompts(text_teacher):
    prompts, settings = ["house", "a red apple"], {"guidance_scale": 3.0, "num_inference_steps": 3, "count": 4}
    settings["num_images_per_prompt"] = 2
    given, null = embeddings(text_teacher, prompts), embeddings(text_teacher, "a green car", "negative_")
    expected = tokens(text_teacher, prompts, negative_prompt="a green car", **settings)
    assert torch.equal(tokens(text_teacher, negative_prompt="a green car", **given, **settings), expected)
    assert torch.equal(tokens(text_teacher, prompts, **null, **settings), expected)
    assert torch.equal(tokens(text_teacher, **given, **null, **settings), expected)
    default = tokens(text_teacher, prompts, **settings)
    assert torch.equal(tokens(text_teacher, **given, **settings), default)

    student = student_of(text_teacher)
    assert torch.equal(tokens(student, **given, count=2), tokens(student, prompts, count=2))


def test_embeddings_need_no_text_encoder(text_teacher):
    given, null = embeddings(text_teacher, ["house"]), embeddings(text_teacher, ["a green car"], "negative_")
    parts = {**text_teacher.components, "text_encoder": None, "text_tokenizer": None}
    bare = MaskedDiffusionPipeline(**parts)
    expected = tokens(text_teacher, "house", negative_prompt="a green car", guidance_scale=3.0, count=1)
    assert torch.equal(tokens(bare, **given, **null, guidance_scale=3.0, count=1), expected)
    assert torch.equal(
        tokens(bare, **given, guidance_scale=1.0, count=1), tokens(text_teacher, "house", guidance_scale=1.0, count=1)
    )
    with pytest.raises(ValueError, match="leads away from a negative prompt"):
        bare(**given, guidance_scale=3.0)
    with pytest.raises(ValueError, match="without its text encoder"):
        bare(**given, negative_prompt="a green car")


def test_embeddings_that_do_not_fit(text_teacher, teacher):
    given, null = (
        embeddings(text_teacher, ["house", "a red apple"]),
        embeddings(text_teacher, ["house"] * 3, "negative_"),
    )
    swapped = dict(zip(given, reversed(given.values()), strict=True))
    condition = text_teacher.encode_condition("house")
    for wrong in (
        {"prompt_embeds": given["prompt_embeds"]},
        swapped,
        given | {"prompt_embeds": given["prompt_embeds"][:1]},
        given | {"prompt": "house"},
        given | null,
        given | null | {"negative_prompt": "a car"},
        {"condition": condition, "negative_prompt": "a car"},
    ):
        with pytest.raises(ValueError, match=r"embeds|embeddings"):
            text_teacher(**wrong)
    with pytest.raises(ValueError, match="not conditioned on text"):
        teacher(**given)


# Names of classes


def test_classes_by_name(teacher, tmp_path):
    for kind, pipe in [
        ("teacher", MaskedDiffusionPipeline(teacher.denoiser, teacher.tokenizer, teacher.sampler, class_names=ANIMALS)),
        ("student", student_of(teacher, class_names=ANIMALS)),
    ]:
        pipe.save_pretrained(tmp_path / kind)
        pipe = type(pipe).from_pretrained(tmp_path / kind)
        assert pipe.class_names == ANIMALS
        expected = tokens(pipe, [0, 7, 8], count=3)
        assert torch.equal(tokens(pipe, class_labels=["cat", "ewe", "3"], count=3), expected)
        assert torch.equal(tokens(pipe, class_labels="cat", count=1), expected[:1])
        assert torch.equal(tokens(pipe, class_labels=["cat", 7, 8], count=3), expected)
        with pytest.raises(ValueError, match=r"'cot' is no class name of this model.*cat"):
            pipe(class_labels=["cot"])
        with pytest.raises(ValueError, match=r"'crane' is the name of the classes \[4, 6\]"):
            pipe(class_labels=["crane"])


def test_without_names_nothing_of_them_is_saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert "class_names" not in json.loads((tmp_path / "model_index.json").read_text())
    assert type(pipe).from_pretrained(tmp_path).class_names is None
    with pytest.raises(ValueError, match="class labels, which have no names"):
        pipe(class_labels=["cat"])


@pytest.mark.parametrize("names", [ANIMALS[:9], [*ANIMALS[:9], 9], {"0": "cat"}, dict.fromkeys(range(1, 11), "cat")])
def test_names_that_do_not_fit(teacher, names):
    with pytest.raises(ValueError, match="class_names must be 10 names"):
        MaskedDiffusionPipeline(teacher.denoiser, teacher.tokenizer, teacher.sampler, class_names=names)


# On a device


def test_pipelines_whose_networks_are_kept_off_the_device(gpu, teacher, text_teacher):
    for pipe, call in [
        (student_of(teacher), {"class_labels": [3, 7]}),
        (teacher, {"class_labels": [3, 7], "guidance_scale": 2.0}),
        (student_of(text_teacher), {"prompt": ["house", "a red apple"]}),
        (text_teacher, {"prompt": ["house", "a red apple"], "num_inference_steps": 3}),
    ]:
        here = pipe(generator=sample_generators(0, places=range(2)), output_type="pt", **call).images
        pipe.enable_model_cpu_offload(device="cuda")
        assert pipe.denoiser.device.type == "cpu"
        there = pipe(generator=sample_generators(0, places=range(2)), output_type="pt", **call).images
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=0)
        assert pipe.denoiser.device.type == "cpu"  # until the next call
        pipe.remove_all_hooks()
        pipe.to("cpu")
