import json
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from tiny_text import amused_folder
from transformers import CLIPModel, CLIPProcessor

from distill.config import load_config
from distill.jobs.clip import CLIPJob, train_clip
from eval.clip_score import ClipFeatures, clip_score, draw_others, retrieval_accuracy
from eval.monitor import RetrievalMonitor, SampleMonitor
from teachers import MaskedDiffusionPipeline
from teachers.conditions.prompts import Prompts
from teachers.data import DataConfig, load_data


def test_a_trained_clip_tells_its_captions_apart(clip_folder, pictures):
    data = load_data(DataConfig(name=str(pictures), text_column="text", label_column="", num_channels=3))
    captions = sorted(set(data.texts))
    rows = torch.tensor([captions.index(text) for text in data.texts])
    features = ClipFeatures.load(clip_folder, captions)
    embeddings = features(data.images())
    right = features.judge(embeddings, rows)
    assert right["retrieval_accuracy"] > 0.95
    wrong = features.judge(embeddings, (rows + 5) % len(captions))
    assert wrong["retrieval_accuracy"] < 0.05
    assert wrong["clip_score"] < right["clip_score"] - 0.3


def test_the_score_is_that_of_torchmetrics(clip_folder, pictures):
    multimodal = pytest.importorskip("torchmetrics.multimodal.clip_score", reason="torchmetrics is not installed")
    data = load_data(DataConfig(name=str(pictures), text_column="text", label_column="", num_channels=3))
    images, captions = data.images()[::7], data.texts[::7]

    class AsTensors(CLIPModel):  # as torchmetrics expects embeddings, and transformers gave them before version 5
        def get_image_features(self, *arguments, **settings):
            return super().get_image_features(*arguments, **settings).pooler_output

        def get_text_features(self, *arguments, **settings):
            return super().get_text_features(*arguments, **settings).pooler_output

    metric = multimodal.CLIPScore(
        lambda: (AsTensors.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder))
    )
    theirs = metric((255 * images).round().byte(), captions).item()
    features = ClipFeatures.load(clip_folder, captions)
    cosine = torch.nn.functional.cosine_similarity(features(images), features.embed_captions(captions))
    assert 100 * cosine.mean().item() == pytest.approx(theirs, abs=1e-3)


def test_scores_of_known_embeddings():
    images = torch.eye(4)
    assert clip_score(images, torch.eye(4)) == {"clip_score": 1, "clip_score_error": 0}
    half = torch.nn.functional.normalize(torch.eye(4) + torch.eye(4).roll(1, 0), dim=-1)
    assert clip_score(images, half)["clip_score"] == pytest.approx(0.5**0.5)
    rows = torch.tensor([0, 1, 2, 0])
    assert retrieval_accuracy(images, torch.eye(4), rows) == 0.75
    noise = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    captions = torch.nn.functional.normalize(torch.randn(100, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    chance = retrieval_accuracy(noise, captions, torch.arange(4000) % 100)
    assert chance == pytest.approx(1 / 32, abs=0.012)


def test_a_missing_clip_and_a_missing_column(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="no CLIP at"):
        ClipFeatures.load(tmp_path)
    with pytest.raises(ValueError, match=r"data\.text_column"):
        train_clip(load_config(CLIPJob, overrides=[f"data.name={pictures}", "data.text_column="]))


def test_captions_in_images_and_scores_out(command, clip_folder, tmp_path):
    amused_folder(tmp_path / "amused")
    Path("captions.txt").write_text("a red square\na green bar\na grey cross, and much more of which nothing is seen\n")
    arguments = ["--captions", "name=captions.txt", "--clip", clip_folder, "--output", "out", "--num-images", 7]
    arguments += ["--num-inference-steps", 2]
    status, last, errors = command("evaluate_text.py", "amused", *arguments)
    assert status == 0, errors
    result = json.loads(last)
    assert -1 <= result["clip_score"] <= 1
    assert "1 of them cut" in result["protocol"]["captions"]
    kept = next(Path("out").glob("images-*")).stat().st_mtime_ns
    assert json.loads(command("evaluate_text.py", "amused", *arguments)[1]) == result
    assert next(Path("out").glob("images-*")).stat().st_mtime_ns == kept
    captions = Path("captions.txt").read_text()
    Path("captions.txt").write_text(captions.replace("green", "blue"))
    status, _, errors = command("evaluate_text.py", "amused", *arguments)
    assert status == 2
    assert "other settings: captions_sha256 (" in errors


def test_other_captions_are_drawn_without_listing_all():
    own = torch.arange(4000) % 9
    drawn = draw_others(own, 9, 3, torch.Generator().manual_seed(0))
    assert not (drawn == own[:, None]).any()
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    counts = torch.stack([torch.bincount(drawn[own == row].flatten(), minlength=9) for row in range(9)])
    share = counts.double() / (own[:, None] == torch.arange(9)).sum(0)[:, None]  # of an own caption's images
    expected = 3 / 8 * (1 - torch.eye(9, dtype=torch.float64))
    assert (share - expected).abs().max() < 4 * (3 / 8 * 5 / 8 / 444) ** 0.5
    rest = draw_others(torch.tensor([2]), 4, 3, torch.Generator())
    assert sorted(rest[0].tolist()) == [0, 1, 3]
    many = draw_others(torch.tensor([0, 10**12 - 1]), 10**12, 31, torch.Generator())  # as a matrix: 16 terabytes
    assert many.max() < 10**12


def test_captions_in_use_alone_are_embedded_each_once(clip_folder):
    features = ClipFeatures.load(clip_folder, ["a red square", "a green bar", *["a blue bar"] * 5, "a grey cross"])
    seen = []
    features.model.text_model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    images = features.embed_captions(["a red square", "a blue bar", "a blue bar"])
    assert seen == [2]
    measured = features.judge(images, torch.tensor([0, 2, 5]))
    assert seen == [2]
    assert measured["clip_score"] == pytest.approx(1, abs=1e-6)
    assert measured["retrieval_accuracy"] == 1  # a caption is no rival of itself


def test_pairs_to_retrieve_may_be_of_any_size(clip_folder, pictures, tmp_path):
    """And of a single one there is nothing to tell apart."""
    clip, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    for num_pairs in (3, 1):
        images = [PIL.Image.new("RGB", (20 + number, 16)) for number in range(num_pairs)]
        rows = datasets.Dataset.from_dict(
            {"image": images, "text": ["a red square", "a green bar", "a cross"][:num_pairs]}
        )
        rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{num_pairs}.parquet")
        data = DataConfig(
            name=str(tmp_path / f"{num_pairs}.parquet"), text_column="text", label_column="", num_channels=3
        )
        measures = RetrievalMonitor(data)(clip, processor, 0)
        assert bool(measures) == (num_pairs > 1)


def test_a_clip_scores_samples_of_prompts_without_real_images(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.monitor.NUM_IMAGES", 20)
    pipeline = MaskedDiffusionPipeline.from_pretrained(amused_folder(tmp_path / "amused"))
    prompts = Prompts(pipeline, ["a red square", "a green bar"] * 20)
    measures = SampleMonitor(tmp_path / "run", DataConfig(name=""), str(clip_folder))(pipeline, prompts, 3)
    assert measures.keys() == {"clip_score", "clip_score_error", "retrieval_accuracy"}
    assert SampleMonitor(tmp_path / "other", DataConfig(name=""))(pipeline, prompts, 3) == {}
