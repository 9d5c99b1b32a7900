import json
from pathlib import Path

import pytest
import torch
from tiny_text import amused_folder
from transformers import CLIPModel, CLIPProcessor

from distill.config import load_config
from distill.jobs.clip import CLIPJob, train_clip
from eval.clip_score import ClipFeatures, clip_score, retrieval_accuracy
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
    cosine = torch.nn.functional.cosine_similarity(features(images), features.captions)
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
    kept = next(Path("out").glob("chunk-*")).stat().st_mtime_ns
    assert json.loads(command("evaluate_text.py", "amused", *arguments)[1]) == result
    assert next(Path("out").glob("chunk-*")).stat().st_mtime_ns == kept
