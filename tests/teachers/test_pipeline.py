import numpy as np
import PIL.Image
import pytest
import torch

from students import OneStepPipeline, TokenInitialiser
from students.export import sample_grid
from teachers import MaskedDiffusionPipeline
from teachers import pipeline as pipeline_module
from teachers.conditions.condition import NO_CLASS, ClassCondition, Condition
from teachers.randomness import sample_generators
from teachers.tokenizers import vq
from teachers.tokenizers.vq import VQTokenizer


def test_a_saved_pipeline_makes_the_same_images(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    loaded = MaskedDiffusionPipeline.from_pretrained(tmp_path)
    assert (loaded.mask_token_id, loaded.codebook_size, loaded.token_grid) == (16, 16, (4, 4))
    assert loaded.sampler.config.order == "random"
    images = [
        pipe(class_labels=[3, 7], generator=torch.Generator().manual_seed(1), output_type="pt").images
        for pipe in (teacher, loaded)
    ]
    assert torch.equal(*images)


def test_output_types(teacher):
    pil = teacher([3, 7]).images
    assert isinstance(pil[0], PIL.Image.Image)
    assert pil[0].size == (8, 8)
    assert isinstance(teacher([3], output_type="np").images, np.ndarray)
    assert teacher([3], output_type="pt").images.shape == (1, 1, 8, 8)
    assert teacher([3], output_type="tokens").images.shape == (1, 16)
    assert len(teacher(4, return_dict=False)[0]) == 1
    with pytest.raises(ValueError, match="output_type='jpeg'"):
        teacher([3], output_type="jpeg")


@pytest.mark.parametrize("labels", [[3, 10], [-1], [2.5], [], ["a dog"]])
def test_labels_that_the_model_does_not_know(teacher, labels):
    with pytest.raises(ValueError, match=r"class label|prompts"):
        teacher(labels)


def test_step_counts_that_make_no_sense(teacher):
    with pytest.raises(ValueError, match="num_inference_steps=0"):
        teacher([3], num_inference_steps=0)


def test_conditions():
    condition = ClassCondition(torch.tensor([1, 2, 3]))
    assert condition.null().class_labels.tolist() == [NO_CLASS] * 3
    assert condition.null(where=torch.tensor([True, False, True])).class_labels.tolist() == [NO_CLASS, 2, NO_CLASS]
    joined = Condition.concatenate([condition.select(slice(1, None)), condition.select(torch.tensor([0]))])
    assert joined.class_labels.tolist() == [2, 3, 1]


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_large_batch_is_made_in_pieces_whose_logits_fit(teacher, monkeypatch, kind):
    initialiser = TokenInitialiser.for_teacher(teacher, "marginal", embedding_noise=0.1)
    pipeline = teacher if kind == "teacher" else OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser)
    rows = []
    teacher.denoiser.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    outputs = []
    for limit in (pipeline_module.MAX_LOGITS, 3 * 16 * 16):
        rows.clear()
        monkeypatch.setattr(pipeline_module, "MAX_LOGITS", limit)
        outputs.append(pipeline([0, 1, 2, 3, 4, 5, 6], generator=sample_generators(0, places=range(7))))
    assert max(rows) == 3
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    assert outputs[0].nfe == outputs[1].nfe
    with pytest.raises(ValueError, match="got 5 generators for a batch of 4"):
        pipeline([0, 1, 2, 3], generator=sample_generators(0, places=range(5)))


def test_a_vq_works_on_so_many_pixels_at_once(monkeypatch):
    settings = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4}
    settings |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "num_vq_embeddings": 24, "latent_channels": 4}
    tokenizer = VQTokenizer((8, 8), settings)
    rows = []
    for part in (tokenizer.vq.encoder, tokenizer.vq.decoder):
        part.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    images = torch.rand(5, 3, 8, 8)
    whole = tokenizer.encode(images), tokenizer.decode(torch.arange(80).view(5, 16) % 24)
    monkeypatch.setattr(vq, "MAX_PIXELS", 2 * 64)
    rows.clear()
    pieces = tokenizer.encode(images), tokenizer.decode(torch.arange(80).view(5, 16) % 24)
    assert rows == [2, 2, 1, 2, 2, 1]
    assert torch.equal(whole[0], pieces[0])
    torch.testing.assert_close(whole[1], pieces[1])


def test_a_picture_of_large_samples_has_fewer_of_them(teacher):
    columns = teacher.encode_condition(list(range(10)))
    assert sample_grid(teacher, columns).size == (10 * 34, 8 * 34)
    teacher.tokenizer.register_to_config(image_size=(1024, 1024))
    assert sample_grid(teacher, columns).size == (5 * 34, 2 * 34)
