"""What is computed on Inception features, with a stand-in for the network, whose weights cannot be part of a test."""

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_text import amused_folder

from eval import imagenet, inception
from eval.distances import Gaussian, frechet_distance, inception_score
from eval.evaluate import generate, generate_features
from eval.real import describe, embed
from teachers import MaskedDiffusionPipeline
from teachers.data import DataConfig, load_data
from teachers.folder import file_digest


class StubNetwork(torch.nn.Module):
    """The interface of the real one; its features are the means of each channel, 2048 of them."""

    def __init__(self):
        super().__init__()
        self.layers = Mean()
        self.output = torch.nn.Linear(2048, 7)
        with torch.no_grad():
            self.output.weight.copy_(torch.eye(7, 2048) * torch.arange(7)[:, None] / 255)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        features = self.layers(x)
        if return_features:
            return features
        logits = torch.nn.functional.linear(features, self.output.weight) if no_output_bias else self.output(features)
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
    probabilities = extractor.probabilities(extractor(GREYS))
    expected = (torch.arange(7.0) * torch.tensor([[0.0], [128.0], [255.0]]) / 255).softmax(-1)
    torch.testing.assert_close(probabilities, expected)
    whole = extractor._network.base((255 * GREYS).round().expand(-1, 3, -1, -1), no_output_bias=True)
    torch.testing.assert_close(probabilities, whole)


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
    features, _, _ = generate_features(teacher, extractor, 1000, seed=1)
    real = Gaussian.fit(features)
    np.savez("statistics.npz", mu=real.mean.numpy(), sigma=real.covariance.numpy())
    images = torch.cat([batch.images for batch in generate(teacher, torch.arange(60), seed=1)])
    pixels = (images.expand(-1, 3, -1, -1) * 255).byte().permute(0, 2, 3, 1)
    np.savez_compressed("real.npz", arr_0=pixels.contiguous().numpy())

    def evaluate(*more, **changes):
        given = {"statistics": "statistics.npz", "real-images": "real.npz", "output": "out", "num-images": 1200}
        given |= {key.replace("_", "-"): value for key, value in changes.items()}
        arguments = [part for key, value in given.items() for part in (f"--{key}", value)]
        arguments += ["--inception-path", weights, *more]
        return command("evaluate_imagenet.py", "teacher", *arguments)

    return evaluate


def test_the_protocol_gives_the_distance_of_the_images_and_goes_on_after_an_interruption(
    evaluate, teacher, weights, tmp_path, monkeypatch
):
    seen, prepare = [], inception.InceptionFeatures._prepare
    monkeypatch.setattr(
        inception.InceptionFeatures, "_prepare", lambda self, images: seen.append(len(images)) or prepare(self, images)
    )
    status, last, errors = evaluate("--few-images", num_images=1200)
    assert status == 0, errors
    assert sum(seen) == 1200 + 60  # each image once, for features and probabilities
    result = json.loads(last)
    extractor = inception.InceptionFeatures(weights, mode="legacy_tensorflow")
    features, _, _ = generate_features(teacher, extractor, 1200, seed=0)
    statistics = imagenet.read_statistics(tmp_path / "statistics.npz")
    expected = frechet_distance(statistics, Gaussian.fit(features))
    assert result["fid"] == pytest.approx(expected, rel=1e-6)
    assert 0 < result["precision"] <= 1
    assert result["published"]["fid"] == 6.91
    assert result["protocol"]["statistics"].endswith(file_digest(tmp_path / "statistics.npz"))

    chunks = sorted((tmp_path / "out").glob("images-*"))
    assert len(chunks) == 12
    kept = chunks[0].stat().st_mtime_ns
    chunks[1].unlink()
    assert json.loads(evaluate("--few-images", num_images=1200)[1]) == result
    assert chunks[0].stat().st_mtime_ns == kept


def test_damaged_real_images_are_found_before_any_is_generated(evaluate, tmp_path):
    content = bytearray((tmp_path / "real.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.npz").write_bytes(content)
    status, _, errors = evaluate("--few-images", real_images="damaged.npz")
    assert status == 2
    assert "damaged.npz is damaged" in errors
    assert not list((tmp_path / "out").glob("images-*"))


def test_real_images_are_read_a_few_at_a_time(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    images = imagenet.NpzImages(tmp_path / "real.npz")
    parts = list(images.batches(4))
    assert [tuple(part.shape) for part in parts] == [(4, 3, 4, 6), (4, 3, 4, 6), (2, 3, 4, 6)]
    assert np.array_equal((255 * torch.cat(parts)).round().byte().permute(0, 2, 3, 1).numpy(), pixels)
    for name, content in [
        ("grey", pixels[..., :1]),
        ("flat", pixels[..., 0]),
        ("float", pixels / 255.0),
        ("fortran", np.asfortranarray(pixels)),
    ]:
        np.savez(tmp_path / f"{name}.npz", arr_0=content)
        with pytest.raises(ValueError, match="no arr_0 with uint8 images"):
            imagenet.NpzImages(tmp_path / f"{name}.npz")


def test_fid_of_few_images_is_refused(evaluate, command, weights):
    status, _, errors = evaluate(num_images=2047)
    assert status == 2
    assert "FID of 2047 generated images is not one" in errors
    of_digits = ["--features", "inception", "--inception-path", weights]  # of which there are 1,797
    for arguments in ([*of_digits, "--num-images", 2048], [*of_digits, "--num-images", 30]):
        status, _, errors = command("evaluate.py", "teacher", *arguments)
        assert status == 2
        assert "is not one" in errors
    status, last, errors = command("evaluate.py", "teacher", *of_digits, "--num-images", 30, "--few-images")
    assert status == 0, errors
    assert {"fid", "kid"} <= json.loads(last).keys()


def test_fid_of_captions_says_which_real_images_it_is_against(command, weights, clip_folder, pictures, tmp_path):
    amused_folder(tmp_path / "amused")
    (tmp_path / "captions.txt").write_text("a red square\na green bar\n")
    arguments = ["--captions", "name=captions.txt", "--clip", clip_folder, "--output", "out", "--num-images", 5]
    arguments += ["--num-inference-steps", 1, "--real-images", f"name={pictures}", "split=train"]
    arguments += ["--inception-path", weights, "--few-images"]
    status, last, errors = command("evaluate_text.py", "amused", *arguments)
    assert status == 0, errors
    result = json.loads(last)
    assert result["fid"] > 0
    size = MaskedDiffusionPipeline.from_pretrained(tmp_path / "amused").tokenizer.config.image_size[0]
    data = load_data(DataConfig(name=str(pictures), label_column="", image_size=size, num_channels=3))
    digests = embed(lambda images: images.flatten(1), data)["digests"]
    assert result["protocol"]["reference"] == describe(f"name={pictures} split=train", digests)


def test_real_images_of_captions_are_read_as_those_that_are_made(command, weights, clip_folder, tmp_path):
    """Of any size; and what contradicts the pipeline is said before an image is made."""
    amused_folder(tmp_path / "amused")
    height, width = MaskedDiffusionPipeline.from_pretrained(tmp_path / "amused").tokenizer.config.image_size
    (tmp_path / "captions.txt").write_text("a red square\na green bar\n")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        PIL.Image.new("RGB", (20 + number, 30 - number), (0, 0, 40 * number)).save(
            tmp_path / "photos" / f"{number}.png"
        )
    arguments = ["--captions", "name=captions.txt", "--clip", clip_folder, "--num-images", 2, "--few-images"]
    arguments += ["--num-inference-steps", 1, "--inception-path", weights, "--real-images", "name=photos"]
    status, _, errors = command("evaluate_text.py", "amused", *arguments, "image_size=12", "--output", "twelve")
    assert (status, f"read as 12x12 in colour, where images of {height}x{width}" in errors) == (2, True), errors
    assert not Path("twelve").exists()
    status, last, errors = command("evaluate_text.py", "amused", *arguments, "--output", "out")
    assert status == 0, errors
    assert json.loads(last)["protocol"]["data"]["image_size"] == height
    status, _, errors = command("evaluate_text.py", "amused", *arguments, "--num-images", 1, "--output", "one")
    assert (status, "there are 1 generated images" in errors) == (2, True), errors


def test_mistakes_are_one_line(evaluate, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "three.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
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
        ({"real_images": "large.npz"}, "images of 16x16, and the pipeline makes images of 8x8"),
        ({"real_images": "three.npz"}, "there are 3 real images; what is measured needs at least 4"),
        ({"num_images": 9}, "there are 9 generated images; what is measured needs at least 10"),
        ({"statistics": "small.npz"}, "sigma (3, 3); expected statistics of the 2048 features"),
    ]:
        status, _, errors = evaluate("--few-images", output=f"out-{len(message)}", **changes)
        assert status == 2, errors
        assert message in errors
    assert evaluate("--few-images", num_images=20)[0] == 0
    status, _, errors = evaluate("--few-images", num_images=30)
    assert status == 2
    assert "with other settings" in errors
