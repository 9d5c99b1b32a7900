"""What is computed on Inception features, with a stand-in for the network, whose weights cannot be part of a test."""

import hashlib
import json

import numpy as np
import pytest
import torch

from eval import imagenet, inception
from eval.chunks import write_chunks
from eval.distances import Gaussian, frechet_distance, inception_score
from eval.evaluate import generate
from teachers.conditions.condition import ClassLabels

NUM_CLASSES = 7


class StubNetwork(torch.nn.Module):
    """The interface of the real one; its features are the means of each channel, 2048 of them."""

    def __init__(self):
        super().__init__()
        self.layers = Mean()

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        features = self.layers(x)
        if return_features:
            return features
        logits = features[:, :7] * torch.arange(7) / 255
        if not no_output_bias:
            logits = logits + 100 * torch.ones(7)
        return logits.softmax(-1)


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3)).repeat(1, 683)[:, :2048]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    path = tmp_path / inception.WEIGHTS
    torch.jit.script(StubNetwork()).save(str(path))
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return tmp_path


GREYS = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)


def test_clean_features_follow_clean_fid(weights):
    """Grey images in [0, 1] become uint8, three channels, 299 x 299, and then [-1, 1]."""
    extractor = inception.InceptionFeatures(weights)
    features = extractor(GREYS)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(features[:, 0], (torch.tensor([0.0, 128.0, 255.0]) - 128) / 128)
    assert len(extractor.name.split()[-1].rstrip(")")) == 64


def test_tensorflow_features_leave_resizing_to_the_network(weights):
    extractor = inception.InceptionFeatures(weights, mode="legacy_tensorflow")
    torch.testing.assert_close(extractor(GREYS)[:, 0], torch.tensor([0.0, 128.0, 255.0]))
    probabilities = extractor.probabilities(GREYS)
    expected = (torch.arange(7.0) * torch.tensor([[0.0], [128.0], [255.0]]) / 255).softmax(-1)
    torch.testing.assert_close(probabilities, expected)


def test_inception_score_of_known_distributions():
    certain = torch.eye(5).repeat(20, 1)  # each image surely of one of five classes, all equally often
    assert inception_score(certain, num_splits=4) == pytest.approx(5)
    assert inception_score(torch.full((100, 5), 0.2)) == pytest.approx(1)
    half = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]).repeat(10, 1)
    assert inception_score(half, num_splits=1) == pytest.approx(2)


@pytest.fixture
def evaluate(command, weights, teacher, tmp_path):
    """Runs the script on a saved teacher; its statistics are those of its own images under another seed."""
    teacher.save_pretrained("teacher")
    extractor = inception.InceptionFeatures(weights, mode="legacy_tensorflow")
    images, _, _ = generate(teacher, 1000, seed=1)
    real = Gaussian.fit(extractor(images))
    np.savez("statistics.npz", mu=real.mean.numpy(), sigma=real.covariance.numpy())
    np.savez("real.npz", arr_0=(images[:60].expand(-1, 3, -1, -1) * 255).byte().permute(0, 2, 3, 1).numpy())

    def evaluate(*more, **changes):
        given = {"statistics": "statistics.npz", "real-images": "real.npz", "output": "out", "num-images": 1200}
        given |= {key.replace("_", "-"): value for key, value in changes.items()}
        arguments = [part for key, value in given.items() for part in (f"--{key}", value)]
        return command("evaluate_imagenet.py", "teacher", *arguments, "--inception-path", weights, *more)

    return evaluate


def test_the_protocol_gives_the_distance_of_the_images_and_goes_on_after_an_interruption(
    evaluate, teacher, weights, tmp_path
):
    status, last, errors = evaluate()
    assert status == 0, errors
    result = json.loads(last)
    extractor = inception.InceptionFeatures(weights, mode="legacy_tensorflow")
    images, _, _ = generate(teacher, 1200, seed=0)
    statistics = imagenet.read_statistics(tmp_path / "statistics.npz")
    expected = frechet_distance(statistics, Gaussian.fit(extractor(images)))
    assert result["fid"] == pytest.approx(expected, rel=1e-6)
    assert 0 < result["precision"] <= 1
    assert result["published"]["fid"] == 6.91

    chunks = sorted((tmp_path / "out").glob("chunk-*"))
    assert len(chunks) == 3
    kept = chunks[0].stat().st_mtime_ns
    chunks[1].unlink()
    assert json.loads(evaluate()[1]) == result
    assert chunks[0].stat().st_mtime_ns == kept


def test_processes_share_the_same_images(teacher, weights, tmp_path):
    extractor = inception.InceptionFeatures(weights, mode="legacy_tensorflow")
    for name, num_processes in [("one", 1), ("two", 2)]:
        (tmp_path / name).mkdir()
        for process in range(num_processes):
            write_chunks(
                teacher,
                ClassLabels(torch.arange(10)),
                lambda images: {"features": extractor(images)},
                tmp_path / name,
                1100,
                process=process,
                num_processes=num_processes,
            )
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_mistakes_are_one_line(evaluate, tmp_path):
    np.savez(tmp_path / "empty.npz", other=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", mu=np.array([print]), sigma=np.zeros((1, 1)))
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "text.npz").write_text("no archive")
    for changes, message in [
        ({"statistics": "nowhere.npz"}, "no file nowhere.npz"),
        ({"statistics": "empty.npz"}, "no mu and no sigma"),
        ({"statistics": "pickled.npz"}, "not an .npz file of plain arrays"),
        ({"statistics": "text.npz"}, "not an .npz file of plain arrays"),
        ({"real_images": "statistics.npz"}, "no arr_0"),
        ({"statistics": "small.npz", "num_images": 20}, "statistics of 3"),
    ]:
        status, _, errors = evaluate(output=f"out-{len(message)}", **changes)
        assert status == 2, errors
        assert message in errors
    assert evaluate(num_images=20)[0] == 0
    status, _, errors = evaluate(num_images=30)
    assert status == 2
    assert "with other settings" in errors
