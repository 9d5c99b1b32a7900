import numpy as np
import PIL.Image
import pytest
import torch

from teachers import MaskedDiffusionPipeline
from teachers.conditions.condition import NO_CLASS, ClassCondition, Condition


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
