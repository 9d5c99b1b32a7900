import json
from pathlib import Path

import pytest
import torch

from distill.config import load_config
from distill.jobs.teacher import TeacherJob, train_teacher
from distill.jobs.tokenizer import TokenizerJob, train_tokenizer
from eval.monitor import ReconstructionMonitor
from teachers import MaskedDiffusionPipeline, VQTokenizer
from teachers.data import DataConfig, load_data
from teachers.objectives.vq import codebook_use
from teachers.tokenizers.token_cache import load_token_cache, write_token_cache

SETTINGS = [
    "output=run",
    "network={codebook_size: 32, widths: [8, 16], num_groups: 4}",
    "training={num_steps: 150, batch_size: 32, learning_rate: 0.004, warmup_steps: 10, ema_decay: 0.95, tracker: none}",
]


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def measures(step):
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["step"] == step and "mean_squared_error" in line]
    return line


@pytest.mark.usefixtures("in_tmp_path")
def test_from_images_to_a_teacher_of_its_tokens():
    job = load_config(TokenizerJob, overrides=[*SETTINGS, "training.evaluate_every=150"])
    train_tokenizer(job, ReconstructionMonitor(Path("run"), job.data))
    before, after = measures(0), measures(150)
    assert after["mean_squared_error"] < 0.3 * before["mean_squared_error"]
    assert after["codebook_used"] > 0.8
    assert Path("run/samples/step-000150.png").stat().st_size > 1000

    tokenizer = VQTokenizer.from_pretrained("run/tokenizer")
    config = DataConfig(split="test")
    write_token_cache(Path("tokens"), tokenizer, config, load_data(config))
    overrides = [
        "output=teacher",
        "tokens=tokens",
        "network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}",
        "training={num_steps: 2, batch_size: 8, tracker: none}",
    ]
    train_teacher(load_config(TeacherJob, overrides=overrides))
    pipeline = MaskedDiffusionPipeline.from_pretrained("teacher/pipeline")
    assert pipeline.codebook_size == 32
    assert pipeline([1, 2], output_type="pt").images.shape == (2, 1, 8, 8)
    images = load_data(config).images()
    tokens = load_token_cache(Path("tokens")).tokens
    assert torch.equal(pipeline.encode(images), tokens[torch.arange(len(tokens))].long())


@pytest.mark.usefixtures("in_tmp_path")
def test_a_collapsed_codebook_stops_the_training_with_advice(digits):
    """Without revival most entries of a large codebook are never chosen."""
    steps = []

    def monitor(tokenizer, step):
        steps.append(step)
        return {"perplexity": codebook_use(tokenizer.encode(digits), 256)[1]}

    settings = [*SETTINGS, "training.evaluate_every=75", "objective.revival_share=0"]
    settings += ["network.codebook_size=256"]
    with pytest.raises(ValueError, match=r"codebook has collapsed.*Try"):
        train_tokenizer(load_config(TokenizerJob, overrides=settings), monitor)
    assert steps == [0, 75]


@pytest.mark.usefixtures("in_tmp_path")
def test_what_is_learnt_is_kept_though_it_cannot_be_measured():
    def monitor(tokenizer, step):
        if step:
            raise RuntimeError("the picture does not come out")
        return {"perplexity": 32.0}

    settings = [*SETTINGS, "training.num_steps=2", "data.split='train[:30]'", "training.batch_size=8"]
    assert train_tokenizer(load_config(TokenizerJob, overrides=settings), monitor)
    images = load_data(DataConfig(split="test")).images()
    assert VQTokenizer.from_pretrained("run/tokenizer").encode(images).shape == (297, 16)


def test_wrong_settings_are_named():
    for override, message in [
        ("network.widths=[8, 12]", "multiples of num_groups"),
        ("network.codebook_size=1", "codebook_size=1"),
        ("objective.revival_rate=2", r"objective\.revival_rate=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_config(TokenizerJob, overrides=[override])
