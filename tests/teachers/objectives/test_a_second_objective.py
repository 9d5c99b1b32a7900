"""That an objective is a file: one with a second network, defined here, is chosen by name, trained and resumed."""

import json
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from distill.config import load_config
from distill.jobs.teacher import TeacherJob, train_teacher
from teachers import MaskedDiffusionPipeline
from teachers.corruption import corrupt
from teachers.objectives import OBJECTIVES
from teachers.objectives.masked import masked_cross_entropy
from teachers.objectives.objective import Objective
from teachers.randomness import rand, to_device


@dataclass
class ScheduledConfig:
    name: str = "scheduled"
    schedule_learning_rate: float = 0.05


class Schedule(nn.Module):
    """A weight w > 0 for each position: it is masked with probability t^w."""

    def __init__(self, length):
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros(length))

    def forward(self, progress):
        return progress[:, None] ** self.log_weight.exp()


class ScheduledObjective(Objective):
    config_class = ScheduledConfig
    updates = (("denoiser", "schedule"),)

    def __init__(self, config, denoiser):
        self.mask_token_id = denoiser.mask_token_id
        height, width = denoiser.config.token_grid
        self.networks = {"denoiser": denoiser, "schedule": Schedule(height * width)}
        self.optimizers = {"schedule": {"lr": config.schedule_learning_rate}}

    def losses(self, networks, update, batch, generators, measured=False):
        tokens, condition = batch
        probability = networks["schedule"](to_device(rand(len(tokens), 1, generator=generators)[:, 0], tokens.device))
        corrupted, positions = corrupt(tokens, probability.detach().cpu(), self.mask_token_id, generators)
        logits = networks["denoiser"](corrupted, condition, positions=positions)
        loss = masked_cross_entropy(logits, tokens.flatten()[positions], tokens.numel())
        metrics = {"masked": probability.detach().mean()} if measured else {}
        return {"denoiser": loss, "schedule": (probability.mean() - 0.3).square()}, metrics


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "scheduled", ScheduledObjective)

    def run(name, *settings):
        job = load_config(
            TeacherJob,
            overrides=[
                f"output={tmp_path / name}", "objective.name=scheduled", "tokenizer.codebook_size=16",
                "network={hidden_size: 16, num_layers: 1, num_attention_heads: 2, mlp_size: 32}",
                "training={num_steps: 20, batch_size: 16, log_every: 1, warmup_steps: 0, tracker: none}", *settings,
            ],
        )  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        return train_teacher(job)

    return run


def weights(output):
    newest = output / "checkpoints" / "step-000020"
    return {network: load_file(newest / f"{network}.safetensors") for network in ("denoiser", "schedule")}


def test_it_is_chosen_trained_and_resumed(run, tmp_path):
    assert run("whole")
    whole = weights(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["masked"] == pytest.approx(0.5, abs=0.2)
    assert whole["schedule"]["log_weight"].min() > 0.3  # it learns with its own rate to mask less
    assert not run("parts", "training.max_steps=12")
    assert run("parts", "training.resume=true")
    parts = weights(tmp_path / "parts")
    for network, tensors in whole.items():
        assert all(torch.equal(tensor, parts[network][name]) for name, tensor in tensors.items())
    assert len(MaskedDiffusionPipeline.from_pretrained(tmp_path / "whole" / "pipeline")([3, 7]).images) == 2
