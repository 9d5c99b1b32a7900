import json

import PIL.Image
import pytest
import torch

from eval.completion import HIDDEN, complete, hidden, measure_completion, seam, untouched
from eval.evaluate import Reference
from students import OneStepPipeline, TokenInitialiser


class Pixels:
    """Pixels as features; those of a class are told by their mean."""

    name, distance_names = "pixels", ("fd", "kd")

    def __call__(self, images):
        return images.flatten(1)

    def judge(self, features, rows):
        return {"class_consistency": (features.mean(1).round() == rows).double().mean().item()}


@pytest.fixture
def student(teacher):
    initialiser = TokenInitialiser.for_teacher(teacher, known_tokens=0.5)
    return OneStepPipeline(teacher.denoiser, teacher.tokenizer, initialiser)


@pytest.mark.parametrize(("part", "share"), zip(HIDDEN, (1 / 2, 1 / 4), strict=True))
def test_so_much_is_hidden(part, share):
    assert hidden(part, 8, 8).float().mean() == share
    assert not hidden(part, 28, 28)[..., 0].any()  # the left edge is always shown


def test_a_seam_is_the_step_across_the_masks_edge():
    mask = hidden("right half", 8, 8)
    step = torch.zeros(2, 1, 8, 8)
    step[..., 4:] = 0.3
    assert seam(step, mask) == pytest.approx(0.3)
    step[..., 5:] = 1.0  # what happens elsewhere is none
    assert seam(step, mask) == pytest.approx(0.3)
    centre = hidden("centre", 8, 8)
    assert seam(torch.where(centre, 0.25, 0.0).expand(2, 1, 8, 8), centre) == pytest.approx(0.25)


def test_an_image_is_completed_in_the_same_way_in_any_batch(student, digits):
    images, labels, mask = digits[:6], torch.arange(6), hidden("right half", 8, 8)
    together, nfe = complete(student, images, labels, mask, seed=3)
    assert nfe == 1
    assert together.shape == images.shape
    whole = [complete(student, images[:3], labels[:3], mask, seed=3)[0], together[3:]]
    torch.testing.assert_close(torch.cat(whole), together)
    assert not torch.equal(complete(student, images, labels, mask, seed=4)[0], together)


def test_the_settings_with_the_lowest_distance_are_reported(student, digits):
    labels, mask = torch.zeros(len(digits), dtype=torch.int64), hidden("centre", 8, 8)
    candidates = [{"temperature": temperature} for temperature in (0.2, 1.0, 5.0)]
    reference = Reference(Pixels(), digits.flatten(1), "digits")
    tuned = {
        settings["temperature"]: reference.distance(
            complete(student, digits[:60], labels[:60], mask, 0, **settings)[0].flatten(1)
        )
        for settings in candidates
    }
    row, made = measure_completion(student, candidates, digits, labels, mask, reference, 60, "student")
    assert row["settings"]["temperature"] == min(tuned, key=tuned.get)
    assert row["fd"] == pytest.approx(reference.distance(made.flatten(1)))
    own = untouched(student, digits, labels, mask, reference)
    assert own["fd"] < row["fd"]  # an untrained network completes worse than nothing does


def test_the_command_writes_a_table_and_pictures(command, teacher, student):
    teacher.save_pretrained("teacher")
    student.save_pretrained("student")
    few = [
        "--num-images",
        40,
        "--shown-split",
        "test[:30]",
        "--num-tuning-images",
        20,
        "--steps",
        1,
        4,
        "--temperatures",
        0.8,
        "--guidance-scales",
        1,
    ]
    arguments = ["--teacher", "teacher", "--students", "student", "--output", "completion", *few]
    status, last, errors = command("evaluate_completion.py", *arguments, "--classifier", "classifier")
    assert status == 0, errors
    rows, protocol = json.loads(last)["rows"], json.loads(last)["protocol"]
    assert (protocol["shown_split"], protocol["num_images"]) == ("test[:30]", 30)
    assert protocol["reference"].startswith("1797 images of digits")
    assert [row["nfe"] for row in rows if row["hidden"] == "centre"] == [0, 1, 1, 4]
    assert {row["hidden"] for row in rows} == set(HIDDEN)
    assert PIL.Image.open("completion/right-half.png").size == (12 * 34, 5 * 34)
